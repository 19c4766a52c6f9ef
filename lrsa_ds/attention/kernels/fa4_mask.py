"""Parts of flash-attn-4's kernels, written in CuTe: the masks over intervals, and the loop of the backward pass.

Import this module only when a kernel is about to be called: it needs the extra `fa4`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cutlass
from cutlass import cute
from flash_attn.cute import flash_bwd_sm90, flash_fwd_sm90
from flash_attn.cute.mask import (
    AttentionMask,
    mask_r2p_lambda,
    r2p_bitmask_above,
    r2p_bitmask_below,
    sm90_col_to_r2p_idx,
)
from quack.layout_utils import reshape_acc_to_mn


@contextmanager
def interval_kernels() -> Iterator[None]:
    """Inside this context flash-attn-4 compiles kernels that mask by intervals; `aux_tensors` are their ends.

    Its own kernels call `mask_mod` for one query and one key. Those compiled here call it for a tile of scores: pass
    `forward_mask` to the forward pass, which reads the ends of the intervals once for each query, and `backward_mask`
    to the backward pass.

    The loop of the backward pass is replaced too. flash-attn-4 has two, one over blocks that are seen in part and one
    over those seen in full. The assembler gives its uniform registers to the first loop only. The second one, with
    nearly all blocks, then computes the addresses of its matrix multiplications in every iteration: 524 instructions.
    The replacement is a single loop with 430.
    """
    originals = flash_fwd_sm90.AttentionMask, flash_bwd_sm90.consume_block_sparse_mma_bwd_sm90
    flash_fwd_sm90.AttentionMask = _TileMask
    flash_bwd_sm90.consume_block_sparse_mma_bwd_sm90 = _loop_over_queries
    try:
        yield
    finally:
        flash_fwd_sm90.AttentionMask, flash_bwd_sm90.consume_block_sparse_mma_bwd_sm90 = originals


class _TileMask(AttentionMask):
    """Replaces flash-attn-4's mask in the forward pass; the arguments have the names of the method it overrides.

    flash-attn-4 passes `mask_mod` only for blocks that are seen in part. The others need no mask, not even at the end
    of the keys: see `block_cover`.
    """

    def apply_mask(self, acc_S, m_block, n_block, thr_mma, mask_mod=None, aux_data: Any = None, **_):
        if mask_mod is not None:
            shape, heads_in_a_row = (self.tile_m, self.tile_n), self.qhead_per_kvhead_packgqa
            mask_mod(acc_S, m_block, n_block, thr_mma, shape, heads_in_a_row, aux_data.tensors)


@cute.jit
def forward_mask(scores, m_block, n_block, thr_mma, shape: cutlass.Constexpr, heads_in_a_row: cutlass.Constexpr, ends):
    """Masks the scores of a tile where a query does not see the key, with one bit for each key of a thread.

    Rows are queries; `heads_in_a_row` successive rows are heads of the same query. `ends` are four tensors, the ends of
    the two intervals of each query.
    """
    at = reshape_acc_to_mn(thr_mma.partition_C(cute.make_identity_tensor(shape)))
    table = reshape_acc_to_mn(scores)
    first_key = n_block * shape[1] + at[0, 0][1]
    for i in cutlass.range_constexpr(cute.size(at.shape[0])):
        query = (m_block * shape[0] + at[i, 0][0]) // heads_in_a_row
        a_lo, a_hi, b_lo, b_hi = (sm90_col_to_r2p_idx(end[query] - first_key) for end in ends)
        mask_r2p_lambda(table[i, None], partial(_bits, a_lo, a_hi, b_lo, b_hi), rank1=True)


def _bits(a_lo, a_hi, b_lo, b_hi, part):
    in_a = r2p_bitmask_above(a_lo, part) & r2p_bitmask_below(a_hi, part)
    return in_a | (r2p_bitmask_above(b_lo, part) & r2p_bitmask_below(b_hi, part))


@cute.jit
def backward_mask(scores, m_block, masked, kv_block, mask, thr_mma, ends):
    """Masks the scores of a tile of the backward pass if `masked`; with `mask.swap_AB` its columns are queries."""
    shape = (mask.tile_n, mask.tile_m) if cutlass.const_expr(mask.swap_AB) else (mask.tile_m, mask.tile_n)
    at = reshape_acc_to_mn(thr_mma.partition_C(cute.make_identity_tensor(shape)), transpose=mask.swap_AB)
    of_query, of_key = (1, 0) if cutlass.const_expr(mask.swap_AB) else (0, 1)
    table = reshape_acc_to_mn(scores, transpose=mask.swap_AB)
    if masked:
        for i in cutlass.range_constexpr(cute.size(at.shape[0])):
            query = m_block * mask.tile_m + at[i, 0][of_query]
            bounds = [end[query] for end in ends]
            for j in cutlass.range_constexpr(cute.size(at.shape[1])):
                key = kv_block * mask.tile_n + at[0, j][of_key]
                seen = ((key >= bounds[0]) & (key < bounds[1])) | ((key >= bounds[2]) & (key < bounds[3]))
                table[i, j] = table[i, j] if seen else -cutlass.Float32.inf


# flash-attn-4 finds compiled kernels by this hash, also in its cache on disk: it covers the code of this file.
for _mask in (forward_mask, backward_mask):
    _mask.__cute_hash__ = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _loop_over_queries(
    tables, batch, head, kv_block, q_state, do_state, one_block, mask, mask_mod, *, thr_mma_SdP, q_subtile_factor,
    m_block_max, aux_data, **_
):  # fmt: skip
    """Replaces flash-attn-4's function in the backward pass; the arguments have its names."""
    counts = [count[batch, head, kv_block] for count in (tables.mask_block_cnt, tables.full_block_cnt)]
    lists = [blocks[batch, head, kv_block, None] for blocks in (tables.mask_block_idx, tables.full_block_idx)]
    mask_fn = partial(mask_mod, kv_block=kv_block, mask=mask, thr_mma=thr_mma_SdP, ends=aux_data.tensors)
    return _loop(*counts, *lists, q_state, do_state, one_block, mask_fn, q_subtile_factor, m_block_max)


@cute.jit
def _loop(
    num_partly,
    num_wholly,
    partly,
    wholly,
    q_state,
    do_state,
    one_block: cutlass.Constexpr,
    mask_fn: cutlass.Constexpr,
    parts: cutlass.Constexpr,
    num_tiles,
):
    """Processes all blocks of queries that see one block of keys, each block in `parts` tiles."""
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
                tile, q_state, do_state, mask_fn=partial(mask_fn, masked=place < num_partly), dKV_accumulate=accumulate
            )
            accumulate = True
    return q_state, do_state
