"""`few_rows` in Triton kernels: the weights of all its products are read once, by one launch.

Few rows have too little arithmetic for the time to depend on anything but how fast weights are read. So each program
takes some columns of one product for all rows, without splitting the sum. The readable form is in `few_rows.py`.

Shapes: M rows, K channels of the input, N of a product.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch

from lrsa_ds.attention.fused_decoding import HAS_TRITON, starts_early

MOST_ROWS = 16
MOST_WEIGHTS = 3
NARROWEST = 16  # columns that a program takes: the smallest side of a tile of tensor cores

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def _product(w0, w1, w2, b0, b1, b2, n0, n1, n2, at, GATED: tl.constexpr):
        """Weight and bias of the product that has column `at`, where it has it, and how many it has."""
        w, b, start, n = w0, b0, at, n0
        if not GATED:
            if at >= n0 + n1:
                w, b, start, n = w2, b2, at - n0 - n1, n2
            elif at >= n0:
                w, b, start, n = w1, b1, at - n0, n1
        return w, b, start, n

    @triton.jit
    def _finish(
        sums, up, squares, b, residual, out, place, start, inside, is_row, rows, width, residual_m, eps,
        k: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
    ):  # fmt: skip
        """Writes columns of a product from its sums fp32 [COLUMNS, ROWS]."""
        if NORM:
            scale = tl.rsqrt(squares / k + eps)[None, :]
            sums, up = sums * scale, up * scale
        if HAS_BIAS:
            sums += tl.load(b + start, mask=inside, other=0.0)[:, None].to(tl.float32)
        if GATED:
            sums = sums / (1 + tl.exp(-sums)) * up
        mask = inside[:, None] & is_row[None, :]
        if ADD:
            added = tl.load(residual + rows[None, :] * residual_m + place[:, None], mask=mask, other=0.0)
            sums += added.to(tl.float32)
        tl.store(out + rows[None, :] * width + place[:, None], sums.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _rows_kernel(
        x, w0, w1, w2, b0, b1, b2, norm, residual, out, num_rows, x_m, residual_m, n0, n1, n2, eps, k: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
        NORM: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """`COLUMNS` columns of x [M, K] @ w.T, of w0, w1 or w2, into [M, n0 + n1 + n2]; N of w0 and w1 are whole tiles.

        GATED: of silu(x @ w0.T) * (x @ w1.T) into [M, n0]. NORM: of x / rms(x) * norm in the place of x; the root mean
        square of a row divides its sums in the end. ADD: plus `residual`. EARLY: see `starts_early`.
        """
        at = tl.program_id(0) * COLUMNS
        rows, columns, channels = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        w, b, start, n = _product(w0, w1, w2, b0, b1, b2, n0, n1, n2, at, GATED)
        is_row, inside = rows < num_rows, start + columns < n
        w_at = w + (start + columns)[:, None].to(tl.int64) * k + channels[None, :]
        up_at = w1 + (start + columns)[:, None].to(tl.int64) * k + channels[None, :]
        x_at = x + rows[:, None] * x_m + channels[None, :]
        sums, up = tl.zeros([COLUMNS, ROWS], tl.float32), tl.zeros([COLUMNS, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        if EARLY:
            gdc_wait()
        for first in range(0, k, DEPTH):
            left = channels < k - first
            part = tl.load(x_at + first, mask=is_row[:, None] & left[None, :], other=0.0)
            if NORM:
                given = part.to(tl.float32)
                squares += tl.sum(given * given, axis=1)
                weight = tl.load(norm + first + channels, mask=left, other=0.0).to(tl.float32)
                part = (given * weight[None, :]).to(part.dtype)
            mask = inside[:, None] & left[None, :]
            weights = tl.load(w_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
            sums = tl.dot(weights, tl.trans(part), sums, input_precision="ieee")
            if GATED:
                weights = tl.load(up_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
                up = tl.dot(weights, tl.trans(part), up, input_precision="ieee")
        if EARLY:
            gdc_launch_dependents()
        width = n0 if GATED else n0 + n1 + n2
        _finish(
            sums, up, squares, b, residual, out, at + columns, start + columns, inside, is_row, rows, width,
            residual_m, eps, k, HAS_BIAS, GATED, NORM, ADD,
        )  # fmt: skip

    @triton.jit
    def _row_kernel(
        x, w0, w1, w2, b0, b1, b2, norm, residual, out, num_rows, x_m, residual_m, n0, n1, n2, eps, k: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
        NORM: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """As `_rows_kernel`, for one row, without tensor cores: more loads are in flight."""
        at = tl.program_id(0) * COLUMNS
        columns, channels, rows = tl.arange(0, COLUMNS), tl.arange(0, DEPTH), tl.arange(0, 1)
        w, b, start, n = _product(w0, w1, w2, b0, b1, b2, n0, n1, n2, at, GATED)
        inside = start + columns < n
        w_at = w + (start + columns)[:, None].to(tl.int64) * k + channels[None, :]
        up_at = w1 + (start + columns)[:, None].to(tl.int64) * k + channels[None, :]
        sums, up = tl.zeros([COLUMNS, DEPTH], tl.float32), tl.zeros([COLUMNS, DEPTH], tl.float32)
        squares = tl.zeros([DEPTH], tl.float32)
        if EARLY:
            gdc_wait()
        for first in range(0, k, DEPTH):
            left = channels < k - first
            mask = inside[:, None] & left[None, :]
            weights = tl.load(w_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
            part = tl.load(x + first + channels, mask=left, other=0.0).to(tl.float32)
            if NORM:
                squares += part * part
                part *= tl.load(norm + first + channels, mask=left, other=0.0).to(tl.float32)
            sums += weights.to(tl.float32) * part[None, :]
            if GATED:
                weights = tl.load(up_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
                up += weights.to(tl.float32) * part[None, :]
        if EARLY:
            gdc_launch_dependents()
        width = n0 if GATED else n0 + n1 + n2
        squares = tl.sum(squares, axis=0) + tl.zeros([1], tl.float32)
        _finish(
            tl.sum(sums, axis=1)[:, None], tl.sum(up, axis=1)[:, None], squares, b, residual, out,
            at + columns, start + columns, inside, rows < 1, rows, width, residual_m, eps,
            k, HAS_BIAS, GATED, NORM, ADD,
        )  # fmt: skip


def fused_few_rows(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    gated: bool,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `few_rows`; x [M, K] and `residual` [M, N] of at most `MOST_ROWS` rows on a GPU."""
    (num_rows, k), sizes = x.shape, [len(weight) for weight in weights]
    x, added = (y if y.stride(1) == 1 else y.contiguous() for y in (x, x if residual is None else residual))
    columns, depth, warps, stages = _tile(num_rows, sizes, k, gated, x)
    out = x.new_empty(num_rows, sizes[0] if gated else sum(sizes))
    n0, n1, n2 = (*sizes, 0, 0)[:MOST_WEIGHTS]
    programs = triton.cdiv(n0, columns) if gated else sum(triton.cdiv(n, columns) for n in sizes)
    kernel = _row_kernel if num_rows == 1 else _rows_kernel
    kernel[programs,](
        x, *_three(weights), *_three(biases or weights), x if norm is None else norm, added, out,
        num_rows, x.stride(0), added.stride(0), n0, n1, n2, eps, k,
        ROWS=_padded(num_rows), COLUMNS=columns, DEPTH=depth, HAS_BIAS=bool(biases), GATED=gated,
        NORM=norm is not None, ADD=residual is not None, num_warps=warps, num_stages=stages, **starts_early(x.device),
    )  # fmt: skip
    return out


def _tile(num_rows: int, sizes: Sequence[int], k: int, gated: bool, x: torch.Tensor) -> tuple[int, int, int, int]:
    """Columns and channels that a program takes at once, its warps, and its stages: the fastest of ten on an H100."""
    width = x.element_size()
    if num_rows == 1:
        return 2, (1024 if gated else 2048) // width, 4, 2
    if gated or (len(sizes) == 1 and sizes[0] > 8192):
        columns, depth, warps, stages = 64, 256 // width, 4, 4
    elif k > 4096:
        columns, depth, warps, stages = 16, 1024 // width, 2, 6
    else:
        columns, depth, warps, stages = 16, 512 // width, 4, 4
    loaded = ((1 + gated) * columns + _padded(num_rows)) * depth * width  # for one stage
    shared = cast(Any, torch.cuda.get_device_properties(x.device)).shared_memory_per_block_optin
    return columns, depth, warps, max(1, min(stages, 1 + (shared - 4096) // loaded))


def _padded(num_rows: int) -> int:
    """Rows of the tile that takes so many."""
    return 8 if num_rows <= 8 else MOST_ROWS


def _three(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`MOST_WEIGHTS` tensors, some of them again if there are fewer."""
    return [tensors[min(index, len(tensors) - 1)] for index in range(MOST_WEIGHTS)]
