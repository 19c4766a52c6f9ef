"""Interval attention on FlexAttention: a block-sparse flash kernel, compiled on CUDA.

The block mask comes from integers and is cached per layout. The kernel is compiled once per shape: the mask reads its
intervals from tensors, so that another layout of the same shape compiles nothing.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lrsa_ds.attention.kernels.blocks import BLOCK, as_lists, block_cover, interval_rows
from lrsa_ds.attention.kernels.interval import Intervals


def flex_interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function as `interval_attention`. Shapes as there."""
    attend = compiled_flex_attention() if q.is_cuda else flex_attention
    num_queries = q.shape[2]
    if num_queries < BLOCK:
        # The kernel needs a whole block of queries: the missing ones see what the last one sees and are cut off again.
        q = torch.nn.functional.pad(q, (0, 0, 0, BLOCK - num_queries))
    mask = _block_mask(intervals, q.shape[2], k.shape[2])
    gqa = q.shape[1] != k.shape[1]
    out, aux = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None  # it was asked for
    return out[:, :, :num_queries], aux.lse[:, :, :num_queries]


@lru_cache(maxsize=1)
def compiled_flex_attention():
    """FlexAttention, compiled anew for every shape and never for another layout of the same shape."""
    # Beyond the limit dynamo would fall back to the eager version, which holds the full score matrix: fullgraph makes
    # that an error, and a higher limit leaves room for several models, lengths and gradient modes.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@lru_cache(maxsize=64)
def _block_mask(intervals: Intervals, num_queries: int, num_keys: int) -> BlockMask:
    rows = interval_rows(intervals)
    a_lo, a_hi, b_lo, b_hi = rows.unbind()

    def sees(batch, head, q_index, kv_index):
        in_a = (kv_index >= a_lo[q_index]) & (kv_index < a_hi[q_index])
        in_b = (kv_index >= b_lo[q_index]) & (kv_index < b_hi[q_index])
        return in_a | in_b

    partly, wholly = block_cover(rows, num_keys)
    return BlockMask.from_kv_blocks(
        *as_lists(partly),
        *as_lists(wholly),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_queries, num_keys),
    )
