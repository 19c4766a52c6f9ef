"""Blocks of queries and keys for block-sparse kernels, from the intervals that the queries see: integers only.

A mask is never evaluated per element here: whether a block is seen in full, in part or not at all follows from the
least and the largest ends of the intervals of its queries.
"""

import torch

from lrsa_ds.attention.interval import Intervals
from lrsa_ds.partition import PartitionTable

BLOCK = 128
# Number of sizes that the kept buffer of a sequence can take between nothing and everything kept.
BUFFER_SIZES = 16


def padded_buffer_size(table: PartitionTable) -> int:
    """Slots of the kept buffer rounded up to one of `BUFFER_SIZES` sizes, so that few shapes are ever compiled."""
    step = BLOCK * -(-table.num_tokens // (BLOCK * BUFFER_SIZES))
    return -(-table.buffer_size // step) * step


def interval_rows(intervals: Intervals) -> torch.Tensor:
    """The ends of both intervals of each query, a_lo, a_hi, b_lo, b_hi: int32 [4, N'], N' a whole number of blocks.

    The last query is repeated, which changes neither the union nor the intersection of its block.
    """
    also = intervals.also or Intervals(*torch.zeros_like(torch.stack([intervals.lo, intervals.hi])))
    rows = torch.stack([intervals.lo, intervals.hi, also.lo, also.hi]).int()
    return torch.cat([rows, rows[:, -1:].expand(-1, -rows.shape[1] % BLOCK)], dim=1).contiguous()


def block_cover(rows: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of keys that a block of queries sees in part, and those that it sees in full.

    Args:
        rows: as `interval_rows` gives them; an interval with hi <= lo is empty.

    Returns:
        Two bool tensors [query blocks, key blocks], disjoint. The first may name a few blocks that no query sees, where
        a block of queries spans two documents; the mask decides there.
    """
    a_lo, a_hi, b_lo, b_hi = rows.view(4, -1, BLOCK).unbind()
    first = torch.arange(0, num_keys, BLOCK, device=rows.device)[None]
    last = (first + BLOCK).clamp(max=num_keys)
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


def as_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block matrix [rows, columns] as the count of each row and its columns, the set ones first and ascending.

    Returns:
        int32 [1, 1, rows] and [1, 1, rows, columns].
    """
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    return counts[None, None].contiguous(), columns[None, None].contiguous()
