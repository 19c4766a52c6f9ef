"""Interval attention on FlexAttention: a block-sparse flash kernel, compiled on CUDA.

The block mask is computed from integers and cached per layout. The kernel is compiled once per shape: the mask reads
the intervals from tensors, so another layout of the same shape needs no compilation.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.blocks import BLOCK, as_lists, block_cover, interval_rows
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.recompiling import allow_recompiling


def flex_interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function as `interval_attention`, with the same shapes."""
    attend = compiled_flex_attention() if q.is_cuda else flex_attention
    num_queries = q.shape[2]
    if num_queries < BLOCK:
        # The kernel needs a whole block of queries. Padding sees what the last query sees, and is removed again.
        q = torch.nn.functional.pad(q, (0, 0, 0, BLOCK - num_queries))
    mask = _block_mask(intervals, q.shape[2], k.shape[2])
    gqa = q.shape[1] != k.shape[1]
    out, aux = attend(
        q,
        k,
        v,
        score_mod=None if extras.softcap is None else _cap(extras.softcap),
        block_mask=mask,
        scale=extras.scale,
        enable_gqa=gqa,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None  # requested by AuxRequest
    return out[:, :, :num_queries], aux.lse[:, :, :num_queries]


@lru_cache(maxsize=1)
def compiled_flex_attention():
    """FlexAttention, compiled for every shape, but not again for another layout of the same shape."""
    # The eager version stores all scores: fullgraph makes it an error if dynamo falls back to it.
    allow_recompiling()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@lru_cache(maxsize=16)
def _cap(softcap: float):
    """The cap as FlexAttention takes it; one function for each value, so that none is compiled twice."""

    def capped(score, batch, head, q_index, kv_index):
        return softcap * torch.tanh(score / softcap)

    return capped


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
