"""The sizes of a model that decide what a step costs, read off its modules.

Weights are not needed: the meta device will do, and so will weights that ZeRO has sharded.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lrsa_ds.costs.recurrence import Recurrence, recurrences_of
from lrsa_ds.models.heads import HeadDims, head_dims
from lrsa_ds.models.logits import output_head, output_layer
from lrsa_ds.models.patch import PreTrainedModel, layer_classes
from lrsa_ds.models.recurrent import GradientCheckpointingLayer


@dataclass(frozen=True)
class Matrix:
    """A matrix that every token is multiplied with.

    Args:
        size: multiplications for each token: inputs × outputs, of experts those of the chosen ones.
        is_trained: whether it gets a gradient.
        passes_gradient: whether the gradient of its input is needed, for something that is trained before it.
        in_mlp: whether it is outside the attention, or the recurrent module in its place.
    """

    size: int
    is_trained: bool
    passes_gradient: bool
    in_mlp: bool = False


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    Args:
        matrices: in the order in which they are used.
        attention_has_gradient: whether the backward pass reaches its attention, or its recurrent module.
        ends_in_matrix: whether the last matrix is the last to save anything for the backward pass: a recomputed layer
            then stops in front of it.
        recurrence: what its recurrent module costs beside its matrices; None without one.
    """

    matrices: tuple[Matrix, ...]
    attention_has_gradient: bool
    ends_in_matrix: bool
    recurrence: Recurrence | None = None

    @property
    def has_gradient(self) -> bool:
        return self.attention_has_gradient or any(m.is_trained or m.passes_gradient for m in self.matrices)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model; `output` is the matrix that makes logits."""

    layers: tuple[LayerShape, ...]
    output: Matrix
    num_heads: int
    head_dims: HeadDims

    @property
    def recurrences(self) -> list[Recurrence]:
        return [layer.recurrence for layer in self.layers if layer.recurrence is not None]


def model_shape(model: PreTrainedModel) -> ModelShape | None:
    """The shape of a model as it will be trained: with its adapters, frozen parameters and activation checkpointing.

    None for a model whose matrices are not found where those of most families are: layers or output layer without
    `torch.nn.Linear`, experts of which the configuration does not say how many a token takes, or recurrent modules that
    do not run alone.
    """
    config = model.config.get_text_config()
    has_experts = any(hasattr(module, "num_experts") for module in model.modules())
    if len(decoder_layers(model)) != config.num_hidden_layers or not isinstance(output_head(model), nn.Linear):
        return None
    if has_experts and not isinstance(getattr(config, "num_experts_per_tok", None), int):
        return None
    # transformers asks for the gradient of the embeddings of a model with adapters whose layers are recomputed.
    asked = bool(getattr(model, "_require_grads_hooks", None))
    before = asked or _is_trained(cast(nn.Module, model.get_input_embeddings()))
    recurrences = recurrences_of(decoder_layers(model), config)
    if recurrences is None:
        return None
    layers = []
    for layer, recurrence in zip(decoder_layers(model), recurrences, strict=True):
        layers.append(_layer_shape(layer, config, before, recurrence))
        before = before or any(p.requires_grad for p in layer.parameters())
    if not all(layer.matrices for layer in layers):
        return None
    output = cast(Any, output_layer(model))
    matrix = Matrix(output.in_features * output.out_features, _is_trained(output), before)
    return ModelShape(tuple(layers), matrix, config.num_attention_heads, head_dims(config))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, in their order."""
    kinds = set(layer_classes(model))
    own = [m for m in model.modules() if type(m).__name__ in kinds]
    return [m for m in own if mixers_of(m) or isinstance(m, GradientCheckpointingLayer)]


def mixers_of(layer: nn.Module) -> list[nn.Module]:
    """Attention and recurrent module of a decoder layer, whichever it has; a layer may have only an MLP."""
    found = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx") and _matrices_below(m)]
    children = {id(child) for child in layer.children()}
    return [m for m in found if id(m) in children] or found[:1]


def _layer_shape(layer: nn.Module, config: Any, before: bool, recurrence: Recurrence | None) -> LayerShape:
    """The shape of a layer; `before`: whether anything in front of it is trained."""
    mixers, readers = mixers_of(layer), list[nn.Module]()
    for mixer in mixers:
        # All children of attention that hold a matrix read the layer's input, but the last, which makes its output.
        readers += [child for child in mixer.children() if _matrices_below(child)][:-1]
    reading = {id(m) for child in readers for m in _matrices_below(child)}
    inside = {id(m) for mixer in mixers for m in mixer.modules()}
    norms = [child for child in layer.children() if not list(child.children())]
    input_has_gradient = before or any(_is_trained(norm) for norm in norms)
    seen = input_has_gradient  # whether something is trained before the module at hand
    adapted, adding = _adapters_of_parameters(layer)
    matrices, last = [], None
    for name, module in layer.named_modules():
        if id(module) in adding:
            continue
        reads_input = id(module) in reading and "lora_B" not in name
        for size, trained in matrix_sizes(module, config, adapted):
            passes = input_has_gradient if reads_input else seen
            matrices.append(Matrix(size, trained, passes, in_mlp=id(module) not in inside))
            last = module
        seen = seen or _is_trained(module)
    attention_has_gradient = input_has_gradient or any(_is_trained(m) for child in readers for m in child.modules())
    # A norm behind the last matrix saves its output, and so does the weighted sum of experts.
    ends_in_matrix = isinstance(last, nn.Linear) and not hasattr(layer, "post_feedforward_layernorm")
    return LayerShape(tuple(matrices), attention_has_gradient, ends_in_matrix, recurrence)


def _adapters_of_parameters(layer: nn.Module) -> tuple[set[int], set[int]]:
    """The parameters that have adapters themselves, and the modules that hold these, by their ids.

    PEFT adds such an adapter to its parameter in every pass, which takes no multiplications for a token, and needs the
    gradient of the sum.
    """
    wrappers = [cast(Any, m) for m in layer.modules() if hasattr(m, "parameter_name") and hasattr(m, "lora_A")]
    adapted = {id(m.get_param()) for m in wrappers}
    return adapted, {id(x) for m in wrappers for half in (m.lora_A, m.lora_B) for x in half.values()}


def matrix_sizes(module: nn.Module, config: Any, adapted: Collection[int] = ()) -> Iterator[tuple[int, bool]]:
    """The matrices of a module itself: multiplications for each token, and whether they get a gradient.

    Args:
        adapted: ids of frozen parameters that get one, for their adapters.
    """
    if isinstance(module, nn.Linear):
        yield module.in_features * module.out_features, _is_trained(module)
    elif hasattr(module, "num_experts"):
        used = cast(int, config.num_experts_per_tok)
        for parameter in module.parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if len(shape) == 3:  # [experts, outputs, inputs]
                yield used * shape[1] * shape[2], parameter.requires_grad or id(parameter) in adapted
            elif len(shape) == 2:  # the router
                yield shape[0] * shape[1], parameter.requires_grad


def _matrices_below(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
