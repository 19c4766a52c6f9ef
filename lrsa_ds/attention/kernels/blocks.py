"""Blocks of queries and keys for block-sparse kernels, computed from the intervals of the queries: integers only.

No mask is evaluated element by element. The smallest and largest ends of the intervals of a block of queries show
whether these queries see a block of keys in full, in part or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.partition import Chunk, PartitionTable, cut

BLOCK = 128
# The size of the history is rounded up to one of this many sizes, so that few shapes are compiled.
BUFFER_SIZES = 16
# Maximum number of copies of the history for one sequence.
MOST_COPIES = 8
# Programs (thread blocks) that an H100 runs at once.
PROGRAMS = 132
# Queries whose gradients (fp32, 128 channels) fit in the 50 MB L2 cache of an H100, with room for other data.
QUERIES_UNDER_WAY = 65536
# Bounds of `queries_a_copy`. Measured on an H100: copies for 4 or 8 times as many queries as the upper bound were 2 to
# 5 % slower; copies for fewer queries than the lower bound were no faster.
LEAST_QUERIES_A_COPY, MOST_QUERIES_A_COPY = 8192, 32768
# Shorter sequences have no `queries_ahead`, which cost about thirty launches of small kernels. At 32,768 tokens they
# made a pass 8 % faster; at 8,192 the host already takes longer than the GPU.
LEAST_TOKENS_AHEAD = 16384


@dataclass(frozen=True)
class Copies:
    """The history as a kernel reads it: for each part, the slots `[lo, hi)` of the kept buffer, concatenated.

    `size` is the number of slots read. It includes padding at the end, which no query sees.
    """

    parts: tuple[tuple[int, int], ...]
    size: int

    @property
    def num_copied(self) -> int:
        return sum(hi - lo for lo, hi in self.parts)

    def offsets(self) -> list[int]:
        """The first slot of each part in the concatenated history."""
        return [sum(hi - lo for lo, hi in self.parts[:i]) for i in range(len(self.parts))]

    def of(self, kept: torch.Tensor) -> torch.Tensor:
        """The history, [..., size, D], read from the kept buffer [..., R, D]; differentiable."""
        pieces = [kept[..., lo:hi, :] for lo, hi in self.parts]
        missing = self.size - self.num_copied
        # Zeros, since a kernel multiplies keys that no query sees by a weight of 0.
        return torch.cat([*pieces, kept.new_zeros(*kept.shape[:-2], missing, kept.shape[-1])], dim=-2)

    def slots(self, device: torch.device) -> torch.Tensor:
        """For each slot of the history, the slot of the kept buffer that it copies: int64 [size]; 0 for padding."""
        pieces = [torch.arange(lo, hi, device=device) for lo, hi in self.parts]
        return torch.cat([*pieces, torch.zeros(self.size - self.num_copied, dtype=torch.int64, device=device)])


def in_blocks(count: int) -> int:
    """`count` rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def power_of_two(count: int) -> int:
    """`count` rounded up to a power of two, of at least one block."""
    return max(BLOCK, 1 << (count - 1).bit_length())


def padded_buffer_size(table: PartitionTable) -> int:
    """Slots of the kept buffer, rounded up to whole blocks."""
    return in_blocks(table.buffer_size)


def queries_ahead(table: PartitionTable) -> int:
    """Number of queries before the first block, chosen so that blocks begin where chunks of the longest document begin.

    Otherwise time is lost twice: a block of queries that spans two chunks sees the windows of both, and a window that
    begins inside a block of keys sees that block in part. The number is 0 for short sequences, and if a chunk is not a
    whole number of blocks. Queries ahead never have a history: it begins after more than two blocks.
    """
    if table.lag_size % BLOCK or not table.kept_documents or table.num_tokens < LEAST_TOKENS_AHEAD:
        return 0
    longest = max(table.kept_documents, key=lambda document: document.num_partitions)
    return (longest.start + table.sink_size) % BLOCK


def queries_a_copy(table: PartitionTable) -> int:
    """Number of queries that share one copy of the history, a power of two.

    In the backward pass the program with the most work loops over all queries of one copy. While it runs, the other
    programs process queries of other copies, and the gradients of all these queries should stay in the L2 cache.
    `share_of_programs` estimates which share of the GPU the programs of one copy occupy: the larger it is, the fewer
    copies are processed at the same time, and the more queries each copy may have.
    """
    share_of_programs = table.num_pairs / table.num_tokens / BLOCK / PROGRAMS
    count = LEAST_QUERIES_A_COPY
    while 2 * count <= min(QUERIES_UNDER_WAY * share_of_programs, MOST_QUERIES_A_COPY):
        count *= 2
    return count


def copy_history(chunks: Sequence[Chunk], table: PartitionTable, ahead: int = 0) -> tuple[list[Chunk], Copies]:
    """Gives each run of `queries_a_copy` queries its own copy of the part of the history that they see.

    Later queries nearly all see the kept KV of early partitions. Without copies, one program of the backward pass would
    loop over all of these queries, tens of thousands. It would run much longer than the programs of the window, and
    the queries and gradients in use would not fit in the L2 cache. With copies each program loops over the queries of
    one run only.

    Args:
        chunks: of consecutive queries, from 0 on; their `hist_lo` and `hist_hi` are slots of the kept buffer.
        table: of the complete sequence that the chunks belong to.
        ahead: queries before the first block, which have no history. The size of the copies is a whole number of
            blocks minus `ahead`. So if the tokens follow the copies, blocks of keys begin with the same tokens as
            blocks of queries.

    Returns:
        The chunks, cut at the ends of the runs, with `hist_lo` and `hist_hi` as slots of the copies; and the copies.
        The size takes few different values, so that few shapes are compiled.
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
        first: the first query to include.
    """
    also = intervals.also
    others = [torch.zeros_like(intervals.lo)] * 2 if also is None else [also.lo, also.hi]
    rows = torch.stack([intervals.lo, intervals.hi, *others])[:, first:].int()
    return torch.cat([rows, rows[:, -1:].expand(-1, -rows.shape[1] % BLOCK)], dim=1).contiguous()


def block_cover(rows: torch.Tensor, num_keys: int, keys_in_block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of keys that each block of queries sees in part, and those that it sees in full.

    Args:
        rows: as `interval_rows` gives them; an interval with hi <= lo is empty.
        keys_in_block: size of a block of keys; a block of queries has `BLOCK`.

    Returns:
        Two disjoint bool tensors [query blocks, key blocks]: seen in part, seen in full. Where a block of queries spans
        two documents, the first may include a few blocks that no query sees; the mask hides them. An incomplete last
        block of keys is never in the second, so blocks of the second need no check for the end of the keys.
    """
    a_lo, a_hi, b_lo, b_hi = rows.view(4, -1, BLOCK).unbind()
    first = torch.arange(0, num_keys, keys_in_block, device=rows.device)[None]
    last = first + keys_in_block
    some, whole = torch.zeros(2, len(a_lo), first.shape[1], dtype=torch.bool, device=rows.device)
    for lo, hi in ((a_lo, a_hi), (b_lo, b_hi)):
        # An empty interval does not extend the union, and makes the intersection empty.
        empty = hi <= lo
        union_lo = lo.masked_fill(empty, num_keys).amin(1, keepdim=True)
        union_hi = hi.masked_fill(empty, 0).amax(1, keepdim=True)
        some |= (first < union_hi) & (last > union_lo)
        common_lo = lo.masked_fill(empty, num_keys).amax(1, keepdim=True)
        common_hi = hi.masked_fill(empty, 0).amin(1, keepdim=True)
        whole |= (first >= common_lo) & (last <= common_hi)
    return some & ~whole, whole


def as_lists(blocks: torch.Tensor, descending: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A block matrix [rows, columns] as lists: the number of blocks that are set in each row, and all its columns.

    The columns of blocks that are set come first, ascending, or descending with `descending`.

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
