"""LRSA attention of a whole sequence as one interval attention over [kept buffer | tokens]."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.attention.blocks import BLOCK, padded_buffer_size
from lrsa_ds.attention.interval import Intervals
from lrsa_ds.attention.select import buffer_positions, fast_select_partitions, with_kept
from lrsa_ds.config import LRSAConfig
from lrsa_ds.partition import PartitionTable, partition_table


def buffered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    scale: float | None,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The same function as `chunked_attention`, on a kernel with the signature of `interval_attention`."""
    layout = buffered_layout(document_lengths, config, q.device)
    k, v = select_and_gather(k, v, layout)
    return attend(q, k, v, layout.intervals, scale)[0]


@dataclass(frozen=True, eq=False)
class BufferedLayout:
    """A partition table with what its queries see of [kept buffer, padded to `buffer_size` slots | tokens]."""

    table: PartitionTable
    buffer_size: int
    intervals: Intervals


def select_and_gather(k: torch.Tensor, v: torch.Tensor, layout: BufferedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, G, N, D] behind the kept buffer: two [B, G, buffer_size + N, D], with gradients."""
    if not layout.buffer_size:
        return k, v
    positions = buffer_positions(k, v, layout.table, layout.buffer_size, fast_select_partitions)
    return with_kept(k, positions), with_kept(v, positions)


@lru_cache(maxsize=64)
def buffered_layout(document_lengths: tuple[int, ...], config: LRSAConfig, device: torch.device) -> BufferedLayout:
    table = partition_table(document_lengths, config, align=BLOCK)
    buffer_size = padded_buffer_size(table)
    hist_lo, hist_hi, win_lo = (x.to(device) for x in table.intervals())
    own = torch.arange(table.num_tokens, dtype=torch.int32, device=device)
    window = Intervals(win_lo + buffer_size, own + 1 + buffer_size)
    return BufferedLayout(table, buffer_size, Intervals(hist_lo, hist_hi, window))
