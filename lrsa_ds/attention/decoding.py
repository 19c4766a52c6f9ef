"""Attention of one new token of each row over a storage of fixed size, filled as far as tensors on the device say.

Shapes and launches are the same at every token and nothing is read back, so that one CUDA graph serves all of them.
A compiler sees one operator, `torch.ops.lrsa_ds.attend_step`.

Shapes: B rows, H query heads, G KV heads, C entries of the storage, D head dim.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.fused_decoding import HAS_TRITON, fused_attend_entries
from lrsa_ds.attention.kernels.interval import attend_visible
from lrsa_ds.attention.lrsa import in_one_dtype


class Step:
    """Where the next token of each row goes: tensors on the device, whose addresses stay as they are.

    Args:
        storages: keys and values [B, G, C, D] of each layer, which the token is written into.

    Attributes:
        positions: int64 [B, 1], of the tokens in their rows.
        places: int64 [layers, 1], the entry of each layer's storage where the keys and values go, in every row.
        firsts: int64 [layers, B], the first entry that each row has filled.
    """

    def __init__(self, storages: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self.storages = list(storages)
        num_layers, num_rows, device = len(self.storages), len(self.storages[0][0]), self.storages[0][0].device
        self._numbers = torch.zeros((1 + num_layers) * num_rows + num_layers, dtype=torch.int64, device=device)
        self._moving = self._numbers[: num_rows + num_layers]
        self.positions = self._numbers[:num_rows, None]
        self.places = self._numbers[num_rows : num_rows + num_layers, None]
        self.firsts = self._numbers[num_rows + num_layers :].view(num_layers, num_rows)

    def set(self, positions: Sequence[int], places: Sequence[int], firsts: Sequence[Sequence[int]]) -> None:
        numbers = [*positions, *places, *(first for layer in firsts for first in layer)]
        # From pinned memory the copy does not wait for the device.
        given = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._numbers.is_cuda)
        self._numbers.copy_(given, non_blocking=True)

    def advance(self) -> None:
        """To the token after, if no row of any layer was compressed."""
        self._moving += 1

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, extras: Extras) -> torch.Tensor:
        """See `attend_step`."""
        return attend_step(q, k, v, self, layer, extras)


def attend_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, layer: int, extras: Extras
) -> torch.Tensor:
    """Writes the token of a step into the storage of a layer, and attends over the entries up to it.

    Args:
        q: [B, H, 1, D].
        k, v: [B, G, 1, D].

    Returns:
        [B, H, 1, D].
    """
    where = (*step.storages[layer], step.firsts[layer], step.places[layer])
    if torch.compiler.is_compiling():
        return _attend_step(q, k, v, *where, extras.scale, extras.softcap, extras.sinks)
    return store_and_attend(q, k, v, *where, extras)


def store_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    place: torch.Tensor,
    extras: Extras,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    is_known: bool = False,
) -> torch.Tensor:
    """Attention of one token of each row over the entries from `first`, [B], to `place`, [1], where it is stored.

    Args:
        rotation: cosine and sine, [B or 1, 1, 1, D], by which queries and keys are still to be rotated.
        is_known: whether an earlier layer of the step has already used this rotation.
    """
    is_one_dtype = q.dtype == k.dtype == keys.dtype and v.dtype == values.dtype
    if is_one_dtype and not torch.is_autocast_enabled(q.device.type) and can_fuse(q, keys, values, extras):
        return fused_attend_entries(q, keys, values, first, place, extras.scale, (k, v), rotation, is_known)
    if rotation is not None:
        q, k = rotated(q, *rotation), rotated(k, *rotation)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    return attend_entries(q, keys, values, first, place, extras)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


@torch.library.custom_op("lrsa_ds::attend_step", mutates_args=("keys", "values"))
def _attend_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    place: torch.Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    is_known: bool = False,
) -> torch.Tensor:
    """`store_and_attend` as one operator, through which a compiler neither looks nor copies the storage."""
    rotation = None if cos is None or sin is None else (cos, sin)
    extras = Extras(scale, softcap, sinks)
    return store_and_attend(q, k, v, keys, values, first, place, extras, rotation, is_known).contiguous()


@_attend_step.register_fake
def _(q, k, v, keys, values, first, place, scale, softcap, sinks, cos=None, sin=None, is_known=False):
    return q.new_empty(*q.shape[:3], values.shape[3])


def attend_entries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor, extras: Extras
) -> torch.Tensor:
    """Attention of one query of each row over the entries from `first`, [B], up to and with `last`, [1]."""
    q, k, v = in_one_dtype(q, k, v)
    if can_fuse(q, k, v, extras):
        return fused_attend_entries(q, k, v, first, last, extras.scale)
    entries = torch.arange(k.shape[2], device=q.device)
    mask = ((entries >= first[:, None]) & (entries <= last))[:, None, None]
    if not extras.is_plain:
        return extras.with_sinks(*attend_visible(q, k, v, mask, extras))[0]
    # The queries of a group see the same keys: as its rows they need no copy of the keys for each head.
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    output = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=extras.scale)
    return output.reshape(*q.shape[:3], v.shape[3])


def can_fuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> bool:
    """Whether the Triton kernels can attend over such keys and values."""
    return q.is_cuda and HAS_TRITON and k.shape == v.shape and q.dtype != torch.float64 and extras.is_plain
