"""LRSA attention on FlexAttention: one block-sparse flash kernel over [kept buffer | tokens].

The block mask is built from the integers of the partition table, never by evaluating the mask per element, and is
cached per layout. The kernel is compiled once per shape: the kept buffer is padded to one of a few sizes, and the mask
reads its intervals from tensors, so that another layout of the same shape compiles nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lrsa_ds.attention.select import buffer_positions, gather_kept
from lrsa_ds.config import LRSAConfig
from lrsa_ds.partition import PartitionTable, partition_table

BLOCK = 128
# Number of sizes that the kept buffer of a sequence can take between nothing and everything kept.
BUFFER_SIZES = 16


def flex_lrsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    scale: float | None = None,
) -> torch.Tensor:
    """The same function as `chunked_attention`; compiled on CUDA. Shapes as there."""
    num_tokens = q.shape[2]
    if num_tokens < BLOCK:
        # The kernel needs a whole block of queries: the missing ones are a document of their own, cut off again below.
        missing = BLOCK - num_tokens
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        return flex_lrsa_attention(q, k, v, config, (*document_lengths, missing), scale)[:, :, :num_tokens]
    layout = _layout(document_lengths, config, q.device)
    if layout.buffer_size:
        positions = buffer_positions(k, v, layout.table)
        # Slots up to the padded size repeat position 0; no query sees them, so they receive no gradient either.
        positions = torch.nn.functional.pad(positions, (0, layout.buffer_size - positions.shape[2]))
        k, v = (torch.cat([gather_kept(x, positions), x], dim=2) for x in (k, v))
    attend = compiled_flex_attention() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=layout.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache(maxsize=1)
def compiled_flex_attention():
    """FlexAttention, compiled anew for every shape and never for another layout of the same shape."""
    # Beyond the limit dynamo would fall back to the eager version, which holds the full score matrix: fullgraph makes
    # that an error, and a higher limit leaves room for several models, lengths and gradient modes.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class FlexLayout:
    """A partition table with its block mask over [kept buffer, padded to `buffer_size` slots | tokens]."""

    table: PartitionTable
    buffer_size: int
    block_mask: BlockMask


@lru_cache(maxsize=64)
def _layout(document_lengths: tuple[int, ...], config: LRSAConfig, device: torch.device) -> FlexLayout:
    table = partition_table(document_lengths, config, align=BLOCK)
    buffer_size = padded_buffer_size(table)
    hist_lo, hist_hi, win_lo = (x.to(device) for x in table.intervals())
    own = torch.arange(table.num_tokens, dtype=torch.int32, device=device)
    intervals = torch.stack([hist_lo, hist_hi, win_lo + buffer_size, own + 1 + buffer_size])
    return FlexLayout(table, buffer_size, interval_block_mask(intervals, buffer_size + table.num_tokens))


def padded_buffer_size(table: PartitionTable) -> int:
    """Slots of the kept buffer rounded up to one of `BUFFER_SIZES` sizes, so that few shapes are ever compiled."""
    step = BLOCK * -(-table.num_tokens // (BLOCK * BUFFER_SIZES))
    return -(-table.buffer_size // step) * step


def interval_block_mask(intervals_4N: torch.Tensor, num_keys: int) -> BlockMask:
    """The block mask of N queries that each see two intervals of keys, `[a_lo, a_hi)` and `[b_lo, b_hi)`.

    Args:
        intervals_4N: int32 rows a_lo, a_hi, b_lo, b_hi; an interval with hi <= lo is empty.
    """
    num_queries = intervals_4N.shape[1]
    # The last block may be short: repeating its last query changes neither the union nor the intersection of a block.
    pad = intervals_4N[:, -1:].expand(-1, -num_queries % BLOCK)
    a_lo, a_hi, b_lo, b_hi = rows = torch.cat([intervals_4N, pad], dim=1).contiguous().unbind()

    def sees(batch, head, q_index, kv_index):
        in_a = (kv_index >= a_lo[q_index]) & (kv_index < a_hi[q_index])
        in_b = (kv_index >= b_lo[q_index]) & (kv_index < b_hi[q_index])
        return in_a | in_b

    some, whole = _block_cover(rows, num_keys)
    return BlockMask.from_kv_blocks(
        *_as_lists(some & ~whole),
        *_as_lists(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_queries, num_keys),
    )


def _block_cover(rows: tuple[torch.Tensor, ...], num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of keys that some, and that all, queries of a block of queries see: bool [query blocks, key blocks].

    `some` may name a few blocks too many where a block of queries spans two documents; the mask then decides there.
    """
    a_lo, a_hi, b_lo, b_hi = (row.view(-1, BLOCK) for row in rows)
    first = torch.arange(0, num_keys, BLOCK, device=a_lo.device)[None]
    last = (first + BLOCK).clamp(max=num_keys)
    some, whole = torch.zeros(2, len(a_lo), first.shape[1], dtype=torch.bool, device=a_lo.device)
    for lo, hi in ((a_lo, a_hi), (b_lo, b_hi)):
        # An empty interval stays out of the union, and makes the intersection empty.
        empty = hi <= lo
        union_lo = lo.masked_fill(empty, num_keys).amin(1, keepdim=True)
        union_hi = hi.masked_fill(empty, 0).amax(1, keepdim=True)
        some |= (first < union_hi) & (last > union_lo)
        common_lo = lo.masked_fill(empty, num_keys).amax(1, keepdim=True)
        common_hi = hi.masked_fill(empty, 0).amin(1, keepdim=True)
        whole |= (first >= common_lo) & (last <= common_hi)
    return some, whole


def _as_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a block matrix: the count of each row, and its columns with the set ones first."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    return counts[None, None].contiguous(), columns[None, None].contiguous()
