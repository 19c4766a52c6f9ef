"""Which rank computes what of a sequence that is cut into shards: integers of the partition table, before any data.

Rank s of P holds tokens [s*T/P, (s+1)*T/P). Its *halo* is the S + 2L tokens before them: with it the rank has all that
its windows need, all of every partition whose lag reference ends in its shard, and every sink that ends there. Such a
partition or sink belongs to the rank: it selects and sends its part of the kept buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lrsa_ds.attention.blocks import BLOCK, Copies, copy_history, padded_buffer_size
from lrsa_ds.attention.interval import Intervals
from lrsa_ds.config import LRSAConfig, require
from lrsa_ds.parallel.stretches import num_stretches
from lrsa_ds.partition import PartitionTable, cut, intervals_of, partition_table


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """The part of one rank. Positions count tokens of [halo | shard] where they are called local."""

    shard_size: int
    halo_size: int  # of this rank: the first ranks may have less before them than S + 2L
    sent_halo_size: int  # of the next rank, which this rank sends
    window: Intervals  # of each query of the shard, over [halo | shard]
    history: Intervals  # of each query of the whole sequence, over the copies of the kept buffer
    sink_positions: torch.Tensor  # local
    starts: torch.Tensor  # local, first token of each partition that this rank selects
    order: torch.Tensor  # from [sinks | kept KV] of this rank to the order of the kept buffer
    num_sent: tuple[int, ...]  # slots that each rank contributes
    # For each slot of the (padded) kept buffer, its place in the ranks' contributions; gaps name some.
    buffer_slots: torch.Tensor
    copies: Copies


def check_shards(num_tokens: int, size: int, config: LRSAConfig, key: str, exchange: str) -> None:
    """Raises LRSAError unless `num_tokens` tokens shared by `size` ranks leave each stretch long enough for a halo."""
    halo = config.sink_size + 2 * config.lag_size
    each = num_stretches(exchange)
    length = -(-num_tokens // (size * each))
    most = max(1, num_tokens // (halo * each))
    require(
        size == 1 or length >= halo,
        f"parallel.sp_size={size} with parallel.exchange={exchange} cuts {key} = {num_tokens:,} tokens into stretches "
        f"of {length:,}, and LRSA needs at least sink_size + 2 * lag_size = {halo:,}: give at most {most}, or longer "
        "sequences.",
    )


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
    mine = [p for p in pieces if p.owner == index]
    sinks = [torch.arange(p.token, p.token + p.size) for p in mine if p.is_sink]
    starts = [p.token for p in mine if not p.is_sink]
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
        sink_positions=(torch.cat([*sinks, torch.empty(0, dtype=torch.int64)]) - first_local).to(device),
        starts=(torch.tensor(starts, dtype=torch.int64) - first_local).to(device),
        order=order_of(mine).to(device),
        num_sent=tuple(sum(p.size for p in pieces if p.owner == rank) for rank in range(size)),
        buffer_slots=slots_of(pieces, size, buffer_size).to(device),
        copies=copies,
    )


@dataclass(frozen=True)
class Piece:
    """A sink or the kept KV of a partition: the tokens it comes from, its slots, and the rank it belongs to."""

    is_sink: bool
    token: int  # the first
    slot: int
    size: int
    owner: int


def pieces_of(table: PartitionTable, owner_of: Callable[[int], int]) -> list[Piece]:
    """All pieces of the kept buffer, in its order; the owner is the rank that holds a piece's last token of all."""
    sink, lag = table.sink_size, table.lag_size
    pieces = []
    for document in table.kept_documents:
        if sink:
            last = document.start + sink - 1
            pieces.append(Piece(True, document.start, document.buffer_lo, sink, owner_of(last)))
        for p in range(document.num_partitions):
            token = document.start + sink + p * lag
            slot = document.buffer_lo + sink + p * table.num_kept
            pieces.append(Piece(False, token, slot, table.num_kept, owner_of(token + 2 * lag - 1)))
    return pieces


def order_of(pieces: list[Piece]) -> torch.Tensor:
    """Where each slot that a rank sends lies in [its sinks | its kept KV]."""
    num_sink = sum(p.size for p in pieces if p.is_sink)
    places, sink_place, kept_place = [], 0, num_sink
    for piece in pieces:
        if piece.is_sink:
            places.append(torch.arange(sink_place, sink_place + piece.size))
            sink_place += piece.size
        else:
            places.append(torch.arange(kept_place, kept_place + piece.size))
            kept_place += piece.size
    return torch.cat([*places, torch.empty(0, dtype=torch.int64)])


def slots_of(pieces: list[Piece], size: int, buffer_size: int) -> torch.Tensor:
    """For each slot of the kept buffer, its place in the contributions of `size` ranks, one after the other.

    Each rank contributes its pieces in the order of the buffer. Gaps name place after place: the backward pass adds
    their zeros, and would be slow to add all of them to one.
    """
    counts = [sum(p.size for p in pieces if p.owner == rank) for rank in range(size)]
    places = [sum(counts[:rank]) for rank in range(size)]
    slots = np.arange(buffer_size) % max(1, sum(counts))
    for piece in pieces:
        place = places[piece.owner]
        slots[piece.slot : piece.slot + piece.size] = np.arange(place, place + piece.size)
        places[piece.owner] += piece.size
    return torch.from_numpy(slots)
