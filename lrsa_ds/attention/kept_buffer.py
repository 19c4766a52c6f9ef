"""The kept buffer in its readable form: which token fills each slot, and the gather that collects keys and values.

Shapes: B batch, G KV heads, N tokens, D head dim, P partitions, K kept per partition, R kept buffer slots.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from lrsa_ds.attention.partition import PartitionTable
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import select_partitions


@dataclass(frozen=True, eq=False)
class BufferPlan:
    """What of the kept buffer does not depend on the data: tensors on one device."""

    positions: torch.Tensor  # int64 [R], the tokens of the sinks in their slots; any tokens in the others
    partitions: Partitions  # those that are history
    slots: torch.Tensor  # int64 [P * K], where the kept positions go


@lru_cache(maxsize=64)
def buffer_plan(table: PartitionTable, size: int, device: torch.device) -> BufferPlan:
    """The plan of a kept buffer of `size` slots, `table.buffer_size` or more."""
    # Gaps name token after token: the backward pass adds their zeros, and would be slow to add all of them to one.
    arange = partial(torch.arange, device=device)
    positions = arange(size) % table.num_tokens
    partitions, slots = [], []
    for document in table.kept_documents:
        first = document.buffer_lo + table.sink_size
        positions[document.buffer_lo : first] = document.start + arange(table.sink_size)
        start = document.start + table.sink_size
        partitions.append(Partitions.adjacent(start, document.num_partitions, table.lag_size, device))
        slots.append(first + arange(document.num_partitions * table.num_kept))
    return BufferPlan(positions, Partitions.joined(partitions), torch.cat(slots))


@torch.no_grad()
def buffer_positions(
    k: torch.Tensor, v: torch.Tensor, table: PartitionTable, layer: int, size: int | None = None
) -> torch.Tensor:
    """Token position that fills each slot of the kept buffer: int64 [B, G, R]. Gaps name some token.

    Args:
        size: R, if it is to be larger than `table.buffer_size`.
    """
    if not table.kept_documents:
        return torch.empty(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
    plan = buffer_plan(table, size or table.buffer_size, k.device)
    kept = select_partitions(k, v, plan.partitions, table.config, layer)
    positions = plan.positions.repeat(*k.shape[:2], 1)
    positions[:, :, plan.slots] = kept.flatten(2)
    return positions


def gather_kept(x: torch.Tensor, positions_BGR: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, G, N, D] at the given positions: the kept buffer [B, G, R, D], with gradients to `x`."""
    return x.gather(2, positions_BGR[..., None].expand(-1, -1, -1, x.shape[3]))
