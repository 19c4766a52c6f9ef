"""Which keys and values of each partition are kept, and the gather that collects them in the kept buffer.

Shapes: B batch, G KV heads, N tokens, D head dim, P partitions, L lag size, K kept per partition, R kept buffer slots.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from lrsa_ds.attention.fused import HAS_TRITON, fused_select_partitions
from lrsa_ds.attention.score import lag_scores
from lrsa_ds.config import LRSAConfig
from lrsa_ds.partition import PartitionTable


def select_kept(k: torch.Tensor, v: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """Positions kept of each partition that can ever be history: all complete partitions but the last.

    Args:
        k, v: keys and values of one document, [B, G, N, D] (their D may differ).

    Returns:
        int64 [B, G, P, K], absolute positions, ascending; P is 0 for a document shorter than S + 2L.

    Source: LagKV, arXiv 2504.04704, section 3; ties go to the lower position.
    """
    num_partitions = max(0, (k.shape[2] - config.sink_size) // config.lag_size - 1)
    starts = config.sink_size + config.lag_size * torch.arange(num_partitions, device=k.device)
    return select_partitions(k, v, starts, config.lag_size, config.num_kept, first=config.sink_size)


@torch.no_grad()
def select_partitions(
    k: torch.Tensor, v: torch.Tensor, starts_P: torch.Tensor, lag: int, num_kept: int, first: int | None = None
) -> torch.Tensor:
    """Positions kept in the partitions that begin at `starts_P`, each followed by its lag reference.

    Args:
        first: the first start, where the partitions are adjacent: spares a copy of the keys and values.

    Returns:
        int64 [B, G, P, K], absolute positions, ascending.
    """
    if len(starts_P) == 0:
        return torch.empty(*k.shape[:2], 0, num_kept, dtype=torch.int64, device=k.device)
    scores = sum(lag_scores(*_partitions(x, starts_P, lag, first)) for x in (k, v))
    # A stable sort, since topk does not say which of two equal scores it takes.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept].sort(dim=-1).values
    return best + starts_P[:, None]


def fast_select_partitions(
    k: torch.Tensor, v: torch.Tensor, starts_P: torch.Tensor, lag: int, num_kept: int, first: int | None = None
) -> torch.Tensor:
    """`select_partitions`, in fused kernels where the tensors are on a GPU."""
    if k.is_cuda and HAS_TRITON and k.shape == v.shape and len(starts_P):
        return fused_select_partitions(k, v, starts_P, lag, num_kept)
    return select_partitions(k, v, starts_P, lag, num_kept, first)


def _partitions(x, starts_P: torch.Tensor, lag: int, first: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Partitions and lag references of keys or values: two [B, G, P, L, D], views where the partitions are adjacent."""
    if first is not None:
        count = len(starts_P) + 1
        parts = x[:, :, first : first + count * lag].unflatten(2, (count, lag))
        return parts[:, :, :-1], parts[:, :, 1:]
    tokens = starts_P[:, None] + torch.arange(2 * lag, device=x.device)
    pairs = x[:, :, tokens]
    return pairs[:, :, :, :lag], pairs[:, :, :, lag:]


@dataclass(frozen=True)
class BufferPlan:
    """What of the kept buffer does not depend on the data: tensors on one device."""

    positions: torch.Tensor  # [R], the tokens of the sinks in their slots; any tokens in the others
    starts: torch.Tensor  # [P], first token of each partition that is history
    slots: torch.Tensor  # [P * K], where the kept positions go


@lru_cache(maxsize=64)
def buffer_plan(table: PartitionTable, size: int, device: torch.device) -> BufferPlan:
    """The plan of a kept buffer of `size` slots, `table.buffer_size` or more."""
    # Gaps name token after token: the backward pass adds their zeros, and would be slow to add all of them to one.
    arange = partial(torch.arange, device=device)
    positions = arange(size) % table.num_tokens
    starts, slots = [], []
    for document in table.kept_documents:
        first = document.buffer_lo + table.sink_size
        positions[document.buffer_lo : first] = document.start + arange(table.sink_size)
        starts.append(document.start + table.sink_size + table.lag_size * arange(document.num_partitions))
        slots.append(first + arange(document.num_partitions * table.num_kept))
    return BufferPlan(positions, torch.cat(starts), torch.cat(slots))


@torch.no_grad()
def buffer_positions(k: torch.Tensor, v: torch.Tensor, table: PartitionTable, size: int | None = None) -> torch.Tensor:
    """Token position that fills each slot of the kept buffer: int64 [B, G, R]. Gaps name some token.

    Args:
        size: R, if it is to be larger than `table.buffer_size`.
    """
    if not table.kept_documents:
        return torch.empty(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
    plan = buffer_plan(table, size or table.buffer_size, k.device)
    first = table.kept_documents[0].start + table.sink_size if len(table.kept_documents) == 1 else None
    kept = select_partitions(k, v, plan.starts, table.lag_size, table.num_kept, first)
    positions = plan.positions.repeat(*k.shape[:2], 1)
    positions[:, :, plan.slots] = kept.flatten(2)
    return positions


def gather_kept(x: torch.Tensor, positions_BGR: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, G, N, D] at the given positions: the kept buffer [B, G, R, D], with gradients to `x`."""
    return x.gather(2, positions_BGR[..., None].expand(-1, -1, -1, x.shape[3]))
