"""The intervals in the language of flash-attn-4's kernels, CuTe: which keys a query sees, and the backward loop.

Imported where a kernel is about to be called, since it needs the extra `fa4`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import cutlass
from cutlass import cute
from flash_attn.cute import flash_bwd_sm90
from flash_attn.cute.utils import scalar_to_ssa
from quack.layout_utils import reshape_acc_to_mn


@cute.jit
def sees(batch, head, q_index, kv_index, seqlen_info, rows):
    """The mask of partly seen blocks for the forward pass; `rows` are the ends of the intervals of all queries."""
    a_lo = scalar_to_ssa(rows[0][q_index[0]], cutlass.Int32)
    a_hi = scalar_to_ssa(rows[1][q_index[0]], cutlass.Int32)
    b_lo = scalar_to_ssa(rows[2][q_index[0]], cutlass.Int32)
    b_hi = scalar_to_ssa(rows[3][q_index[0]], cutlass.Int32)
    return _in_either(kv_index, a_lo, a_hi, b_lo, b_hi)


def _in_either(key, a_lo, a_hi, b_lo, b_hi):
    return ((key >= a_lo) & (key < a_hi)) | ((key >= b_lo) & (key < b_hi))


@contextmanager
def one_backward_loop() -> Iterator[None]:
    """While it holds, kernels compiled for the backward pass walk partly and wholly seen blocks in one loop.

    flash-attn-4 has a loop for each kind. The assembler hands out its uniform registers to the first of the two; the
    second, where nearly all blocks are, computes the addresses of its multiplications anew in every turn: 524
    instructions instead of 430. And a mask is cheaper here, where a query's intervals are read once, not per key.
    """
    theirs = flash_bwd_sm90.consume_block_sparse_mma_bwd_sm90
    flash_bwd_sm90.consume_block_sparse_mma_bwd_sm90 = _walk_queries
    try:
        yield
    finally:
        flash_bwd_sm90.consume_block_sparse_mma_bwd_sm90 = theirs


def _walk_queries(
    tables, batch, head, kv_block, q_state, do_state, one_block, mask, mask_mod, *, thr_mma_SdP, q_subtile_factor,
    m_block_max, aux_data, **_
):  # fmt: skip
    """Stands in for flash-attn-4's function of the backward pass, whose argument names these are."""
    counts = [count[batch, head, kv_block] for count in (tables.mask_block_cnt, tables.full_block_cnt)]
    lists = [blocks[batch, head, kv_block, None] for blocks in (tables.mask_block_idx, tables.full_block_idx)]
    hide = partial(_hide_unseen, kv_block=kv_block, mask=mask, thr_mma=thr_mma_SdP, rows=aux_data.tensors)
    return _loop(*counts, *lists, q_state, do_state, one_block, hide, q_subtile_factor, m_block_max)


@cute.jit
def _loop(
    num_partly,
    num_wholly,
    partly,
    wholly,
    q_state,
    do_state,
    one_block: cutlass.Constexpr,
    hide: cutlass.Constexpr,
    parts: cutlass.Constexpr,
    num_tiles,
):
    """Multiplies one block of keys with the blocks of queries that see it, each in `parts` tiles."""
    accumulate = False
    for turn in cutlass.range((num_partly + num_wholly) * parts, unroll=1):
        place = turn // parts
        block = cutlass.Int32(0)
        if place < num_partly:
            block = partly[place]
        else:
            block = wholly[place - num_partly]
        tile = block * parts + turn % parts
        if tile < num_tiles:
            q_state, do_state = one_block(
                tile, q_state, do_state, mask_fn=partial(hide, masked=place < num_partly), dKV_accumulate=accumulate
            )
            accumulate = True
    return q_state, do_state


@cute.jit
def _hide_unseen(scores, m_block, masked, kv_block, mask, thr_mma, rows):
    """Takes the keys that a query does not see out of the scores of a tile, if it is `masked`."""
    shape = (mask.tile_n, mask.tile_m) if cutlass.const_expr(mask.swap_AB) else (mask.tile_m, mask.tile_n)
    at = reshape_acc_to_mn(thr_mma.partition_C(cute.make_identity_tensor(shape)), transpose=mask.swap_AB)
    of_query, of_key = (1, 0) if cutlass.const_expr(mask.swap_AB) else (0, 1)
    table = reshape_acc_to_mn(scores, transpose=mask.swap_AB)
    if masked:
        for i in cutlass.range_constexpr(cute.size(at.shape[0])):
            query = m_block * mask.tile_m + at[i, 0][of_query]
            ends = [row[query] for row in rows]
            for j in cutlass.range_constexpr(cute.size(at.shape[1])):
                seen = _in_either(kv_block * mask.tile_n + at[0, j][of_key], *ends)
                table[i, j] = table[i, j] if seen else -cutlass.Float32.inf
