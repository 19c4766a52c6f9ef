"""The layout of a sequence that is cut into one shard a rank: integers that do not depend on the data.

Rank s of P holds tokens [s*T/P, (s+1)*T/P). Its *halo* is the S + 2L tokens before them. Shard and halo together
contain the windows of the rank's queries, every partition whose lag reference ends in the shard, and every sink that
ends there. The rank owns these partitions and sinks: it selects and sends their part of the kept buffer.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.attention.kernels.blocks import BLOCK
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.partition import cut, intervals_of, partition_table
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.halo import HaloLayout, halo_layout
from lrsa_ds.parallel.sequence.pieces import SharedBuffer, halo_size, share_buffer


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """What one rank sends, receives and attends to. Local positions count the tokens of [halo | shard]."""

    shard_size: int
    halo_size: int  # of this rank; shorter than S + 2L where fewer tokens precede the shard
    halos: HaloLayout
    window: Intervals  # of each query of the shard, over [halo | shard]
    history: Intervals  # of each query of the whole sequence, over the copies of the kept buffer
    buffer: SharedBuffer


@lru_cache(maxsize=64)
def shard_layout(
    document_lengths: tuple[int, ...], config: LRSAConfig, size: int, index: int, by_blocks: bool, device: torch.device
) -> ShardLayout:
    """The layout of rank `index` of `size`; `by_blocks`: kept buffer aligned and padded for a block-sparse kernel."""
    table = partition_table(document_lengths, config, align=BLOCK if by_blocks else 1)
    shard = table.num_tokens // size
    halo_max = halo_size(config, shard, by_blocks)
    lo = index * shard
    halo = min(lo, halo_max)
    first_local = lo - halo
    chunks, buffer = share_buffer(
        table,
        table.chunks,
        lambda token: token // shard,
        lambda first, last: first - first_local,
        size,
        index,
        by_blocks,
        config,
        device,
    )
    hist_lo, hist_hi, _ = intervals_of(chunks, device)
    _, _, win_lo = intervals_of(cut(table.chunks, lo, lo + shard), device)
    own = torch.arange(halo, halo + shard, dtype=torch.int32, device=device)
    return ShardLayout(
        shard_size=shard,
        halo_size=halo,
        halos=halo_layout(tuple(range(size)), table.num_tokens, halo_max, index),
        window=Intervals(win_lo - first_local, own + 1),
        history=Intervals(hist_lo, hist_hi),
        buffer=buffer,
    )
