"""The floating-point operations of a step, counted from integers: model shape, document lengths, settings by layer.

A product of a matrix with a token is 2 operations for each of its elements, and the gradients of its input and of the
matrix are as much again each, where they are needed. Attention takes 4 operations for each pair of a query and a key
that it sees (`LayerKind.num_pairs`), head and channel; its backward pass 10, since flash attention makes the
scores anew. Layers that are recomputed take their forward pass twice, but for attention that is saved. A recurrence
counts as attention, since it stands in its place: see `lrsa_ds.costs.recurrence`. What costs little is left out: norms,
rotary embedding, short convolutions, activation functions, softmax, selection and optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from lrsa_ds.attention.kinds.kind import kind_of
from lrsa_ds.costs.shape import LayerShape, Matrix, ModelShape
from lrsa_ds.layers import AnyConfig
from lrsa_ds.models.heads import HeadDims

PRODUCT = 2  # a multiplication and an addition
# Products of the size [queries, keys, channels], with the channels of keys and with those of values.
ATTENTION_FORWARD, ATTENTION_BACKWARD = HeadDims(1, 1), HeadDims(3, 2)


@dataclass(frozen=True)
class Flops:
    """Operations of a step or a part of it: in matrices, and in attention."""

    matrices: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matrices + other.matrices, self.attention + other.attention)

    @property
    def total(self) -> float:
        return self.matrices + self.attention


@dataclass(frozen=True)
class Passes:
    """How a step goes through the model.

    Args:
        checkpointing: whether layers are recomputed in the backward pass.
        tiled_mlp: whether the MLPs are recomputed tile by tile, and not with their layers.
        save_attention: whether recomputed layers take the outputs of their attention from the forward pass.
        without_gradient: settings of further passes, without gradients, such as those of a teacher.
    """

    checkpointing: bool = True
    tiled_mlp: bool = False
    save_attention: bool = False
    without_gradient: tuple[AnyConfig, ...] = ()


def seen_pairs(document_lengths: Sequence[int], config: AnyConfig, num_layers: int) -> list[int]:
    """Pairs of a query and a key that it sees, for each layer."""
    lengths = tuple(document_lengths)
    layers = map(config.at_layer, range(num_layers))
    return [kind_of(layer).num_pairs(lengths, layer) for layer in layers]


@dataclass(frozen=True)
class StepFlops:
    """What is executed, and what the same step would execute if LRSA took no layer."""

    executed: Flops
    dense: Flops


def step_flops(
    shape: ModelShape, passes: Passes, document_lengths: Sequence[int], num_slots: int, config: AnyConfig
) -> StepFlops:
    """Operations over one packed row, forward and backward.

    Args:
        document_lengths: all that is computed, padding too.
        num_slots: positions whose logits are computed, see `Batch.num_slots`.
    """
    num_layers, num_tokens = len(shape.layers), sum(document_lengths)
    work = Flops(
        trained_matrix_flops(shape, passes, num_tokens, num_slots), recurrence_flops(shape, passes, num_tokens)
    )
    for other in passes.without_gradient:
        # Its logits, in a function that is recomputed, are computed twice.
        work += forward_flops(shape, document_lengths, 2 * num_slots, other)
    executed, in_full = (
        Flops(0, attention_flops(shape, passes, seen_pairs(document_lengths, settings, num_layers)))
        for settings in (config, config.at_retention(1.0))
    )
    return StepFlops(work + executed, work + in_full)


def forward_flops(shape: ModelShape, document_lengths: Sequence[int], num_slots: float, config: AnyConfig) -> Flops:
    """Operations of a pass without gradients over one packed row, with logits at `num_slots` positions."""
    num_tokens = sum(document_lengths)
    products = num_tokens * sum(m.size for layer in shape.layers for m in layer.matrices)
    pairs = sum(seen_pairs(document_lengths, config, len(shape.layers)))
    attention = PRODUCT * pairs * shape.num_heads * _channels(shape, ATTENTION_FORWARD)
    attention += num_tokens * sum(r.forward for r in shape.recurrences)
    return Flops(PRODUCT * (products + num_slots * shape.output.size), attention)


def trained_matrix_flops(shape: ModelShape, passes: Passes, num_tokens: int, num_slots: int) -> float:
    """Operations in matrices of the pass that is trained on, and of its backward pass."""
    products = num_tokens * sum(_products(layer, passes) for layer in shape.layers)
    output = shape.output
    recomputed = output.is_trained or output.passes_gradient  # logits are never held
    return PRODUCT * (products + num_slots * output.size * (1 + recomputed + _gradients(output)))


def _products(layer: LayerShape, passes: Passes) -> int:
    """Multiplications of a token in a layer, over all its passes."""
    total = sum(m.size * (1 + _gradients(m)) for m in layer.matrices)
    if not layer.has_gradient:
        return total
    # The last matrix of a recomputed MLP is left out: nothing is saved behind it. Some layers have no MLP.
    mlp = [m.size for m in layer.matrices if m.in_mlp]
    tiles = sum(mlp[:-1]) if passes.tiled_mlp else 0
    if passes.checkpointing:
        again = [m.size for m in layer.matrices if not (passes.tiled_mlp and m.in_mlp and layer.ends_in_matrix)]
        total += sum(again) - layer.matrices[-1].size * (layer.ends_in_matrix and not passes.tiled_mlp)
    return total + tiles


def _gradients(matrix: Matrix) -> int:
    return matrix.is_trained + matrix.passes_gradient


def attention_flops(shape: ModelShape, passes: Passes, pairs: Sequence[int]) -> float:
    """Operations of attention, forward and backward, over so many pairs in each layer."""
    forward = _channels(shape, ATTENTION_FORWARD)
    backward = _channels(shape, ATTENTION_BACKWARD) + forward * (passes.checkpointing and not passes.save_attention)
    each = [forward + backward * layer.attention_has_gradient for layer in shape.layers]
    return PRODUCT * sum(map(mul, each, pairs)) * shape.num_heads


def recurrence_flops(shape: ModelShape, passes: Passes, num_tokens: int) -> float:
    """Operations of recurrent modules beside their matrices, forward and backward."""
    each = 0.0
    for layer in shape.layers:
        if layer.recurrence is not None:
            backward = layer.recurrence.backward + layer.recurrence.forward * passes.checkpointing
            each += layer.recurrence.forward + backward * layer.attention_has_gradient
    return num_tokens * each


def _channels(shape: ModelShape, products: HeadDims) -> int:
    """Multiplications of one head for one pair, in so many products."""
    return products.keys * shape.head_dims.keys + products.values * shape.head_dims.values
