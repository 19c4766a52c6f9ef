"""The sizes of a model that decide what it holds in memory, read off its modules; the meta device will do."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lrsa_ds.costs.shape import ModelShape, decoder_layers, matrix_sizes, mixers_of, model_shape
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.models.heads import num_kv_heads
from lrsa_ds.models.logits import output_layer
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.models.recurrent import is_recurrent, recurrent_modules


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A causal language model as it will be trained, in integers.

    Args:
        num_parameters, num_trained: shared ones once.
        mlp_width: of a gated MLP; of experts the widths of those that a token takes, together.
        num_norms: norms of a layer that are as wide as its input.
        has_head_norms: whether queries and keys are normalized too.
        is_tied: whether the output layer has the weights of the embeddings.
    """

    num_parameters: int
    num_trained: int
    num_layers: int
    hidden_size: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # the larger one, where those of keys and values differ
    vocabulary: int
    num_norms: int
    has_head_norms: bool
    is_tied: bool
    shape: ModelShape

    @property
    def has_mlp_adapters(self) -> bool:
        """Whether an MLP has both frozen matrices and trained ones beside them."""
        return any(
            {matrix.is_trained for matrix in layer.matrices if matrix.in_mlp} == {True, False}
            for layer in self.shape.layers
        )


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model with its adapters and frozen parameters.

    Raises:
        LRSAError: its matrices are not found where those of most families are.
    """
    shape, config = model_shape(model), cast(Any, model.config.get_text_config())
    recurrent = sorted({type(module).__name__ for module in recurrent_modules(model)})
    require(
        not recurrent or shape is not None,
        f"model: {type(model).__name__} has recurrent layers ({', '.join(recurrent)}), whose cost is not known, since "
        "their code does not run without a GPU: measure a few steps, with memory.auto=false.",
    )
    if shape is None:
        raise LRSAError(
            f"model: the layers of {type(model).__name__} are not built of torch.nn.Linear, or the configuration does "
            "not say how many experts a token takes, so what a step costs cannot be counted: choose another model."
        )
    width = getattr(config, "hidden_size_per_layer_input", None)
    require(
        not width,
        f"model: {type(model).__name__} gives every layer inputs of its own (hidden_size_per_layer_input={width}), "
        "whose memory is not counted: measure a few steps, with memory.auto=false.",
    )
    layers, output = decoder_layers(model), cast(nn.Linear, output_layer(model))
    mixers = [mixers_of(layer) for layer in layers]
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    return Sizes(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        mlp_width=max(_mlp_width(*both, config) for both in zip(layers, mixers, strict=True)),
        num_heads=shape.num_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=max(shape.head_dims),
        vocabulary=output.out_features,
        num_norms=max(len(_norms(layer)) for layer in layers),
        has_head_norms=any(_norms(m) for own in mixers for m in own if not is_recurrent(m)),
        is_tied=output.weight is embeddings.weight,
        shape=shape,
    )


def _mlp_width(layer: nn.Module, mixers: list[nn.Module], config: Any) -> int:
    """The width of a gated MLP, whose three matrices have C × width elements each."""
    inside = {id(module) for mixer in mixers for module in mixer.modules()}
    outside = [m for name, m in layer.named_modules() if id(m) not in inside and "lora_" not in name]
    return sum(size for module in outside for size, _ in matrix_sizes(module, config)) // (3 * config.hidden_size)


def _norms(module: nn.Module) -> list[nn.Module]:
    """Children whose only parameters are vectors."""
    children = [child for child in module.children() if not isinstance(child, nn.Linear) and list(child.parameters())]
    return [c for c in children if all(len(getattr(p, "ds_shape", p.shape)) == 1 for p in c.parameters())]
