"""The kept buffer in its readable form: the token in each slot, and the gather of keys and values.

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
    """The part of the kept buffer that does not depend on the data: tensors on one device."""

    positions: torch.Tensor  # int64 [R]: tokens of the sinks, in their slots; arbitrary tokens in other slots
    partitions: Partitions  # those whose kept KV is history
    slots: torch.Tensor  # int64 [P * K]: slots of the kept KV


@lru_cache(maxsize=64)
def buffer_plan(table: PartitionTable, size: int, device: torch.device) -> BufferPlan:
    """The plan of a kept buffer with `size` slots, at least `table.buffer_size`."""
    # Unused slots name different tokens: the backward pass adds zeros to these, which is slow if all go to one token.
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
    """The token in each slot of the kept buffer: int64 [B, G, R]. Unused slots name arbitrary tokens.

    Args:
        size: R, if larger than `table.buffer_size`.
    """
    if not table.kept_documents:
        return torch.empty(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
    plan = buffer_plan(table, size or table.buffer_size, k.device)
    kept = select_partitions(k, v, plan.partitions, table.config, layer)
    positions = plan.positions.repeat(*k.shape[:2], 1)
    positions[:, :, plan.slots] = kept.flatten(2)
    return positions


def gather_kept(x: torch.Tensor, positions_BGR: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, G, N, D] at the given positions: [B, G, R, D], with gradients to `x`."""
    return x.gather(2, positions_BGR[..., None].expand(-1, -1, -1, x.shape[3]))
