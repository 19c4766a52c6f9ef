"""The kept buffer in pieces: which rank selects and sends each piece, and its slots in the buffer.

A piece is a sink, or the kept KV of one partition. Its owner is the rank that holds the last token that the selection
of the piece reads: the last token of the sink, or of the partition's lag reference. Earlier tokens that the selection
reads are in the owner's halo.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lrsa_ds.attention.kept_buffer import gather_kept
from lrsa_ds.attention.kernels.blocks import Copies, copy_history, in_blocks, padded_buffer_size
from lrsa_ds.attention.partition import Chunk, PartitionTable
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import fast_select_partitions, select_partitions
from lrsa_ds.lrsa_config import LRSAConfig


@dataclass(frozen=True)
class Piece:
    """A sink or the kept KV of a partition: its tokens, its slots in the kept buffer, and its owner."""

    partition: int | None  # number of the partition in its document; None for a sink
    token: int  # first token of the sink or partition
    slot: int  # first slot of the piece
    size: int  # slots of the piece
    owner: int  # rank that selects and sends it

    @property
    def is_sink(self) -> bool:
        return self.partition is None


def pieces_of(table: PartitionTable, owner_of: Callable[[int], int]) -> list[Piece]:
    """All pieces of the kept buffer, in its order; `owner_of` gives the rank that holds a token."""
    sink, lag = table.sink_size, table.lag_size
    pieces = []
    for document in table.kept_documents:
        if sink:
            last = document.start + sink - 1
            pieces.append(Piece(None, document.start, document.buffer_lo, sink, owner_of(last)))
        for p in range(document.num_partitions):
            token = document.start + sink + p * lag
            slot = document.buffer_lo + sink + p * table.num_kept
            pieces.append(Piece(p, token, slot, table.num_kept, owner_of(token + 2 * lag - 1)))
    return pieces


def order_of(pieces: list[Piece]) -> torch.Tensor:
    """For each slot that a rank sends, its place in [sinks | kept KV] of this rank."""
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


def slots_of(pieces: list[Piece], counts: Sequence[int], buffer_size: int) -> torch.Tensor:
    """For each slot of the kept buffer, its place in the concatenated contributions of all ranks.

    Rank s contributes `counts[s]` slots: its pieces, in the order of the buffer. Gaps of the buffer read consecutive
    places. Their gradients are zeros, but the backward pass would be slow if it added all of them to a single place.
    """
    places = [sum(counts[:rank]) for rank in range(len(counts))]
    slots = np.arange(buffer_size) % max(1, sum(counts))
    for piece in pieces:
        place = places[piece.owner]
        slots[piece.slot : piece.slot + piece.size] = np.arange(place, place + piece.size)
        places[piece.owner] += piece.size
    return torch.from_numpy(slots)


@dataclass(frozen=True, eq=False)
class OwnPieces:
    """The pieces that a rank selects. Positions are local: indices into this rank's keys, halos included."""

    sink_positions: torch.Tensor
    partitions: Partitions
    order: torch.Tensor  # from [sinks | kept KV] of this rank to the order of the kept buffer


def own_pieces(
    pieces: list[Piece], index: int, local: Callable[[int, int], int], config: LRSAConfig, device: torch.device
) -> OwnPieces:
    """The pieces of rank `index`.

    Args:
        local: from the first token of a piece and the last one that its selection reads to the local position of the
            first.
    """
    mine = [p for p in pieces if p.owner == index]
    sinks = [local(p.token, p.token + p.size - 1) + torch.arange(p.size) for p in mine if p.is_sink]
    kept = [p for p in mine if not p.is_sink]
    starts = [local(p.token, p.token + 2 * config.lag_size - 1) for p in kept]
    starts, numbers = (torch.tensor(x, dtype=torch.int64).to(device) for x in (starts, [p.partition for p in kept]))
    return OwnPieces(
        sink_positions=torch.cat([*sinks, torch.empty(0, dtype=torch.int64)]).to(device),
        partitions=Partitions(starts, numbers, first=None),
        order=order_of(mine).to(device),
    )


def select_pieces(
    k: torch.Tensor, v: torch.Tensor, own: OwnPieces, config: LRSAConfig, layer: int, fast: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the kept buffer, in its order: keys and values [1, G, slots, D]."""
    select = fast_select_partitions if fast else select_partitions
    kept = select(k, v, own.partitions, config, layer).flatten(2)
    sinks = own.sink_positions.expand(*k.shape[:2], -1)
    positions = torch.cat([sinks, kept], dim=2)[:, :, own.order]
    return gather_kept(k, positions), gather_kept(v, positions)


@dataclass(frozen=True, eq=False)
class SharedBuffer:
    """The kept buffer of a sequence, which its ranks build together: what each contributes, and what each reads."""

    own: OwnPieces
    num_sent: tuple[int, ...]  # slots that each rank contributes
    slots: torch.Tensor  # for each slot of the kept buffer, its place in the contributions; for gaps any place
    copies: Copies

    def history(self, contributions: list[torch.Tensor]) -> torch.Tensor:
        """The history to read [..., copies, D], from the ranks' contributions [..., num_sent, D]; differentiable."""
        # index_select, not indexing: the backward pass of indexing sorts the indices, though none is there twice.
        return self.copies.of(torch.cat(contributions, dim=-2).index_select(-2, self.slots))


def share_buffer(
    table: PartitionTable,
    chunks: Sequence[Chunk],
    owner_of: Callable[[int], int],
    local: Callable[[int, int], int],
    size: int,
    index: int,
    by_blocks: bool,
    config: LRSAConfig,
    device: torch.device,
) -> tuple[Sequence[Chunk], SharedBuffer]:
    """The part of one rank in the kept buffer of a sequence.

    Args:
        chunks: of the queries that read the history, from query 0 on.
        owner_of: the rank that holds a token.
        local: as `own_pieces` takes it.
        size, index: number of ranks that share the sequence, and the number of this rank among them.
        by_blocks: whether to copy the history for a block-sparse kernel.

    Returns:
        The chunks, with `hist_lo` and `hist_hi` as slots of the history that is read; and the buffer.
    """
    pieces = pieces_of(table, owner_of)
    counts = tuple(sum(p.size for p in pieces if p.owner == rank) for rank in range(size))
    buffer_size = padded_buffer_size(table) if by_blocks else table.buffer_size
    copies = Copies(((0, buffer_size),), buffer_size)
    if by_blocks:
        chunks, copies = copy_history(chunks, table)
    own = own_pieces(pieces, index, local, config, device)
    return chunks, SharedBuffer(own, counts, slots_of(pieces, counts, buffer_size).to(device), copies)


def halo_size(config: LRSAConfig, most: int, by_blocks: bool) -> int:
    """Tokens of a halo: S + 2L, with `by_blocks` rounded up to whole blocks of keys, which kernels process faster.

    Rounding never exceeds `most`, the number of tokens that the neighbour holds.
    """
    halo = config.dense_prefix_size
    return min(most, in_blocks(halo)) if by_blocks else halo
