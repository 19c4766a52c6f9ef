"""Blocks of queries and keys for block-sparse kernels, from the intervals that the queries see: integers only.

A mask is never evaluated per element here: whether a block is seen in full, in part or not at all follows from the
least and the largest ends of the intervals of its queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.partition import Chunk, PartitionTable, cut

BLOCK = 128
# Number of sizes that the kept buffer of a sequence can take between nothing and everything kept.
BUFFER_SIZES = 16
# How many copies a sequence has of its history at most, and what else `queries_a_copy` goes by: programs that an H100
# runs at once, and queries whose gradients, in fp32 and with 128 channels, leave room in its L2 cache of 50 MB. Longer
# runs than the most were slower by 2 to 5 % at 4 and 8 times, shorter ones than the least no faster.
MOST_COPIES = 8
PROGRAMS = 132
QUERIES_UNDER_WAY = 65536
LEAST_QUERIES_A_COPY, MOST_QUERIES_A_COPY = 8192, 32768
# Tokens of a sequence from which on `queries_ahead` are worth the launches of some thirty small operations: they made
# passes over 32,768 tokens 8 % faster, and the host takes longer than the GPU for 8,192 as it is.
LEAST_TOKENS_AHEAD = 16384


@dataclass(frozen=True)
class Copies:
    """What a kernel reads as history: the slots `[lo, hi)` of the kept buffer of each part, one after the other.

    `size` is the number of slots read, with those at the end that no query sees.
    """

    parts: tuple[tuple[int, int], ...]
    size: int

    @property
    def num_copied(self) -> int:
        return sum(hi - lo for lo, hi in self.parts)

    def offsets(self) -> list[int]:
        """Where each part begins in what is read."""
        return [sum(hi - lo for lo, hi in self.parts[:i]) for i in range(len(self.parts))]

    def of(self, kept: torch.Tensor) -> torch.Tensor:
        """The history to read, [..., size, D], from the kept buffer [..., R, D]; differentiable."""
        pieces = [kept[..., lo:hi, :] for lo, hi in self.parts]
        missing = self.size - self.num_copied
        # Zeros, since a kernel multiplies what no query sees by a weight of 0.
        return torch.cat([*pieces, kept.new_zeros(*kept.shape[:-2], missing, kept.shape[-1])], dim=-2)

    def slots(self, device: torch.device) -> torch.Tensor:
        """The slot of the kept buffer behind each slot that is read: int64 [size]; some slot where no query looks."""
        pieces = [torch.arange(lo, hi, device=device) for lo, hi in self.parts]
        return torch.cat([*pieces, torch.zeros(self.size - self.num_copied, dtype=torch.int64, device=device)])


def in_blocks(count: int) -> int:
    """`count` rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def padded_buffer_size(table: PartitionTable) -> int:
    """Slots of the kept buffer, rounded up to whole blocks."""
    return in_blocks(table.buffer_size)


def queries_ahead(table: PartitionTable) -> int:
    """Queries before the first block, if blocks are to begin where the chunks of the longest document do.

    A block of queries that spans two chunks sees the windows of both, and a window that begins within a block of keys
    sees that one in part: both cost time. 0 where chunks are no whole blocks, and for short sequences. None of these
    queries has a history, which begins after more than two blocks.
    """
    if table.lag_size % BLOCK or not table.kept_documents or table.num_tokens < LEAST_TOKENS_AHEAD:
        return 0
    longest = max(table.kept_documents, key=lambda document: document.num_partitions)
    return (longest.start + table.sink_size) % BLOCK


def queries_a_copy(table: PartitionTable) -> int:
    """Queries that read one copy of their history, a power of two.

    The longest program of the backward pass walks all queries of a copy. Meanwhile the other programs get through the
    queries of as many copies as there would be programs of that length in one copy's work.
    """
    share_of_programs = table.num_pairs / table.num_tokens / BLOCK / PROGRAMS
    count = LEAST_QUERIES_A_COPY
    while 2 * count <= min(QUERIES_UNDER_WAY * share_of_programs, MOST_QUERIES_A_COPY):
        count *= 2
    return count


def copy_history(chunks: Sequence[Chunk], table: PartitionTable, ahead: int = 0) -> tuple[list[Chunk], Copies]:
    """A copy of the history for each run of `queries_a_copy` queries, as far as they see it.

    A kept key is seen by nearly all later queries, tens of thousands: the backward pass would walk them in one program,
    with more queries, output gradients and query gradients under way than the GPU's L2 cache holds, and much longer
    than the programs of the window. With copies each program walks the queries of one run.

    Args:
        chunks: of consecutive queries, from 0 on; their `hist_lo` and `hist_hi` are slots of the kept buffer.
        table: of the whole sequence, to which the chunks belong.
        ahead: queries before the first block, which have no history. The copies leave room for as many keys before
            the next block, which begins with the same token then if the tokens follow the copies.

    Returns:
        The chunks cut at the ends of the runs, their history in the copies; and what the copies are. Their size takes
        few values, so that few shapes are compiled.
    """
    num_queries = chunks[-1].q_hi
    run = max(queries_a_copy(table), in_blocks(-(-num_queries // MOST_COPIES)))
    copied, parts, size = [], [], 0
    ends = [*range(ahead + run, num_queries, run), num_queries]
    for start, end in pairwise([0, *ends]):
        mine = cut(chunks, start, end)
        seen = [c for c in mine if c.hist_hi > c.hist_lo]
        first = min((c.hist_lo for c in seen), default=0) // BLOCK * BLOCK
        last = in_blocks(max((c.hist_hi for c in seen), default=0))
        for chunk in mine:
            shift = size - first if chunk.hist_hi > chunk.hist_lo else -chunk.hist_lo
            copied.append(replace(chunk, hist_lo=chunk.hist_lo + shift, hist_hi=chunk.hist_hi + shift))
        parts += [(first, last)] if seen else []
        size += last - first
    step = in_blocks(-(-num_queries // BUFFER_SIZES))
    return copied, Copies(tuple(parts), -(-(size + ahead) // step) * step - ahead)


def interval_rows(intervals: Intervals, first: int = 0) -> torch.Tensor:
    """The ends of both intervals of each query, a_lo, a_hi, b_lo, b_hi: int32 [4, N'], N' a whole number of blocks.

    The last query is repeated, which changes neither the union nor the intersection of its block.

    Args:
        first: the first query that is wanted.
    """
    also = intervals.also
    others = [torch.zeros_like(intervals.lo)] * 2 if also is None else [also.lo, also.hi]
    rows = torch.stack([intervals.lo, intervals.hi, *others])[:, first:].int()
    return torch.cat([rows, rows[:, -1:].expand(-1, -rows.shape[1] % BLOCK)], dim=1).contiguous()


def block_cover(rows: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of keys that a block of queries sees in part, and those that it sees in full.

    Args:
        rows: as `interval_rows` gives them; an interval with hi <= lo is empty.

    Returns:
        Two bool tensors [query blocks, key blocks], disjoint. The first may name a few blocks that no query sees, where
        a block of queries spans two documents; the mask decides there. It has the last block of keys if that is not
        whole, so that nothing needs to look for the end of the keys in the second.
    """
    a_lo, a_hi, b_lo, b_hi = rows.view(4, -1, BLOCK).unbind()
    first = torch.arange(0, num_keys, BLOCK, device=rows.device)[None]
    last = first + BLOCK
    some, whole = torch.zeros(2, len(a_lo), first.shape[1], dtype=torch.bool, device=rows.device)
    for lo, hi in ((a_lo, a_hi), (b_lo, b_hi)):
        # An empty interval stays out of the union, and makes the intersection empty.
        empty = hi <= lo
        union_lo = lo.masked_fill(empty, num_keys).amin(1, keepdim=True)
        union_hi = hi.masked_fill(empty, 0).amax(1, keepdim=True)
        some |= (first < union_hi) & (last > union_lo)
        common_lo = lo.masked_fill(empty, num_keys).amax(1, keepdim=True)
        common_hi = hi.masked_fill(empty, 0).amin(1, keepdim=True)
        whole |= (first >= common_lo) & (last <= common_hi)
    return some & ~whole, whole


def as_lists(blocks: torch.Tensor, descending: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A block matrix [rows, columns] as the count of each row and its columns, the set ones first, in their order.

    Returns:
        int32 [1, 1, rows] and [1, 1, rows, columns].
    """
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    if descending:
        blocks = blocks.flip(-1)
    columns = blocks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    if descending:
        columns = blocks.shape[-1] - 1 - columns
    return counts[None, None].contiguous(), columns.to(torch.int32)[None, None].contiguous()
