"""Which rank computes what of a sequence that is cut into shards: integers of the partition table, before any data.

Rank s of P holds tokens [s*T/P, (s+1)*T/P). Its *halo* is the S + 2L tokens before them: with it the rank has all that
its windows need, all of every partition whose lag reference ends in its shard, and every sink that ends there. Such a
partition or sink belongs to the rank: it selects and sends its part of the kept buffer.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.attention.blocks import BLOCK, Copies, copy_history, padded_buffer_size
from lrsa_ds.attention.interval import Intervals
from lrsa_ds.config import LRSAConfig
from lrsa_ds.parallel.pieces import OwnPieces, own_pieces, pieces_of, slots_of
from lrsa_ds.partition import cut, intervals_of, partition_table


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """The part of one rank. Positions count tokens of [halo | shard] where they are called local."""

    shard_size: int
    halo_size: int  # of this rank: the first ranks may have less before them than S + 2L
    sent_halo_size: int  # of the next rank, which this rank sends
    window: Intervals  # of each query of the shard, over [halo | shard]
    history: Intervals  # of each query of the whole sequence, over the copies of the kept buffer
    own: OwnPieces
    num_sent: tuple[int, ...]  # slots that each rank contributes
    # For each slot of the (padded) kept buffer, its place in the ranks' contributions; gaps name some.
    buffer_slots: torch.Tensor
    copies: Copies


@lru_cache(maxsize=64)
def shard_layout(
    document_lengths: tuple[int, ...], config: LRSAConfig, size: int, index: int, by_blocks: bool, device: torch.device
) -> ShardLayout:
    """The layout of rank `index` of `size`, with the kept buffer aligned and padded where a kernel likes it so."""
    table = partition_table(document_lengths, config, align=BLOCK if by_blocks else 1)
    shard, halo_max = table.num_tokens // size, config.sink_size + 2 * config.lag_size
    if by_blocks:  # kernels are slower where the number of keys is no multiple of a block
        halo_max = min(shard, -(-halo_max // BLOCK) * BLOCK)
    lo = index * shard
    halo = min(lo, halo_max)
    first_local = lo - halo
    pieces = pieces_of(table, lambda token: token // shard)
    buffer_size = padded_buffer_size(table) if by_blocks else table.buffer_size
    chunks, copies = table.chunks, Copies(((0, buffer_size),), buffer_size)
    if by_blocks:
        chunks, copies = copy_history(chunks, table.num_tokens)
    hist_lo, hist_hi, _ = intervals_of(chunks, device)
    _, _, win_lo = intervals_of(cut(table.chunks, lo, lo + shard), device)
    own = torch.arange(halo, halo + shard, dtype=torch.int32, device=device)
    return ShardLayout(
        shard_size=shard,
        halo_size=halo,
        sent_halo_size=min(lo + shard, halo_max) if index + 1 < size else 0,
        window=Intervals(win_lo - first_local, own + 1),
        history=Intervals(hist_lo, hist_hi),
        own=own_pieces(pieces, index, lambda first, last: first - first_local, config, device),
        num_sent=tuple(sum(p.size for p in pieces if p.owner == rank) for rank in range(size)),
        buffer_slots=slots_of(pieces, size, buffer_size).to(device),
        copies=copies,
    )
