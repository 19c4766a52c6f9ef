"""The parts of a causal language model: the decoder, which makes hidden states."""

from collections.abc import Iterator
from typing import cast

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that ends before the output layer; the model itself, or what it names, if there is none.

    `get_decoder` of some classes names the model itself (Llama 4), or its output layer (ModernBERT).
    """
    named, head = model.get_decoder(), model.get_output_embeddings()
    if _ends_before(named, head) or head is None:
        return named
    embeddings = model.get_input_embeddings()
    inner = (part for part in model.modules() if _ends_before(part, head) and holds(part, embeddings))
    return cast(PreTrainedModel, next(inner, named))  # the outermost


def _ends_before(part: nn.Module, head: nn.Module | None) -> bool:
    return isinstance(part, PreTrainedModel) and part.get_output_embeddings() is None and not holds(part, head)


def holds(module: nn.Module, part: nn.Module | None) -> bool:
    """Whether `part` is in `module`."""
    return any(inner is part for inner in module.modules())


def beside_decoder(model: PreTrainedModel) -> list[str]:
    """The paths of the parts that are beside the decoder and the output layer, such as the encoder of images."""
    decoder, head = decoder_of(model), model.get_output_embeddings()

    def found(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if holds(child, decoder):
                yield from found(child, f"{prefix}{name}.") if child is not decoder else ()
            elif head is None or not holds(child, head):
                yield prefix + name

    return [] if decoder is model else list(found(model, ""))


def reads_encoder(path: str) -> bool:
    """Whether a module is attention to the output of an encoder, which a causal language model never calls."""
    return any(name.startswith("encoder_attn") for name in path.split("."))


def holds_experts(parameter: nn.Parameter) -> bool:
    """Whether it is a matrix for each expert; convolutions of single channels, [C, 1, width], have three dims too.

    ZeRO-3 keeps the shape of what it has sharded apart.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) == 3 and min(shape[1:]) > 1
