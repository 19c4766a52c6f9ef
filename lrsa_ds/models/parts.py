"""The parts of a causal language model: the decoder, which makes hidden states."""

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


def reads_encoder(path: str) -> bool:
    """Whether a module is attention to the output of an encoder, which a causal language model never calls."""
    return any(name.startswith("encoder_attn") for name in path.split("."))
