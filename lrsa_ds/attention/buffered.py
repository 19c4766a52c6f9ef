"""LRSA attention of a complete sequence: one interval attention over [copies of the kept buffer | tokens]."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.fused_buffer import fused_buffers
from lrsa_ds.attention.kept_buffer import buffer_positions, gather_kept
from lrsa_ds.attention.kernels.blocks import BLOCK, Copies, copy_history, padded_buffer_size, queries_ahead
from lrsa_ds.attention.kernels.interval import Ahead, Intervals
from lrsa_ds.attention.kernels.kernel import Kernel
from lrsa_ds.attention.partition import PartitionTable, intervals_of, partition_table
from lrsa_ds.attention.selection.fused_lagkv import HAS_TRITON
from lrsa_ds.attention.selection.select import has_fused_path
from lrsa_ds.lrsa_config import LRSAConfig


def buffered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    extras: Extras,
    kernel: Kernel,
    layer: int = 0,
) -> torch.Tensor:
    """The same function as `chunked_attention`, on a kernel of interval attention."""
    layout = buffered_layout(document_lengths, config, q.device, kernel.skips_queries_ahead)
    k, v = select_and_gather(k, v, layout, layer)
    return extras.with_sinks(*kernel(q, k, v, layout.intervals, extras))[0]


@dataclass(frozen=True, eq=False)
class BufferedLayout:
    """A partition table, the copies of its kept buffer, and what each query sees of [copies | tokens]."""

    table: PartitionTable
    copies: Copies
    intervals: Intervals


def select_and_gather(
    k: torch.Tensor, v: torch.Tensor, layout: BufferedLayout, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts the copies of the kept KV before keys and values [B, G, N, D]: two [B, G, copies + N, D], with gradients."""
    if not layout.copies.size:
        return k, v
    if HAS_TRITON and has_fused_path(k, v, layout.table.config):
        return fused_buffers(k, v, layout.table, layout.copies, layer)
    positions = buffer_positions(k, v, layout.table, layer, padded_buffer_size(layout.table))
    keys, values = (torch.cat([layout.copies.of(gather_kept(x, positions)), x], dim=2) for x in (k, v))
    return keys, values


@lru_cache(maxsize=64)
def buffered_layout(
    document_lengths: tuple[int, ...], config: LRSAConfig, device: torch.device, skips_queries_ahead: bool = False
) -> BufferedLayout:
    table = partition_table(document_lengths, config, align=BLOCK)
    # A kernel that has to start at the first query is slower if the copies are not a whole number of blocks.
    ahead = queries_ahead(table) if skips_queries_ahead else 0
    chunks, copies = copy_history(table.chunks, table, ahead)
    hist_lo, hist_hi, win_lo = intervals_of(chunks, device)
    own = torch.arange(table.num_tokens, dtype=torch.int32, device=device)
    window = Intervals(win_lo + copies.size, own + 1 + copies.size)
    return BufferedLayout(table, copies, Intervals(hist_lo, hist_hi, window, Ahead(ahead, copies.size)))
