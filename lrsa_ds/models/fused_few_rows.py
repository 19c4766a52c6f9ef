"""`few_rows` in Triton kernels: the weights of all its products are read once, by one launch.

Few rows have too little arithmetic for the time to depend on anything but how fast weights are read. So each program
takes some columns of one product for all rows, without splitting the sum. The readable form is in `few_rows.py`.

Shapes: M rows, K channels of the input, N of a product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from lrsa_ds.attention.fused_decoding import HAS_TRITON, starts_early

MOST_ROWS = 16
MOST_WEIGHTS = 3
FETCHED_BYTES = 6 << 20  # of the weight behind a product: what is read while one kernel ends and the next begins
LINE_BYTES = 128  # of the L2 cache
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
    def _fetch_rows(w, num_rows, row_bytes, BYTES: tl.constexpr, THREADS: tl.constexpr):
        """Fetches the first `BYTES` of each row of w into the L2 cache: each thread some of the rows."""
        fetch: tl.constexpr = (
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
        )
        programs = tl.num_programs(0)
        for first in range(tl.program_id(0), num_rows, programs * THREADS):
            row = first + tl.arange(0, THREADS) * programs
            at, size = w.to(tl.int64) + row.to(tl.int64) * row_bytes, tl.where(row < num_rows, BYTES, 0)
            tl.inline_asm_elementwise(fetch, "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def _rows_kernel(
        x, w0, w1, w2, b0, b1, b2, norm, residual, behind, out, num_rows, x_m, residual_m, n0, n1, n2, behind_rows,
        behind_row_bytes, eps, k: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        WARPS: tl.constexpr, AHEAD: tl.constexpr, SOON: tl.constexpr, AFTER: tl.constexpr, HAS_BIAS: tl.constexpr,
        GATED: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """`COLUMNS` columns of x [M, K] @ w.T, of w0, w1 or w2, into [M, n0 + n1 + n2]; N of w0 and w1 are whole tiles.

        Each warp sums over channels of its own, `DEPTH` at a time, so warps wait for each other once, in the end.
        GATED: of silu(x @ w0.T) * (x @ w1.T) into [M, n0]. NORM: of x / rms(x) * norm in the place of x; the root mean
        square of a row divides its sums in the end. ADD: plus `residual`. EARLY: see `starts_early`; the kernel behind
        is launched as SOON as this one begins, or when it has read all. AHEAD: bytes of each row of the weights that
        are fetched before the kernel in front has ended, AFTER of `behind`, which the kernel behind reads, in the end.
        """
        at = tl.program_id(0) * COLUMNS
        rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        channels = (tl.arange(0, WARPS) * DEPTH)[:, None, None] + tl.arange(0, DEPTH)[None, None, :]
        w, b, start, n = _product(w0, w1, w2, b0, b1, b2, n0, n1, n2, at, GATED)
        is_row, inside = rows < num_rows, start + columns < n
        w_at = w + (start + columns)[None, :, None].to(tl.int64) * k + channels
        up_at = w1 + (start + columns)[None, :, None].to(tl.int64) * k + channels
        x_at = x + rows[None, :, None] * x_m + channels
        sums, up = tl.zeros([WARPS, COLUMNS, ROWS], tl.float32), tl.zeros([WARPS, COLUMNS, ROWS], tl.float32)
        squares = tl.zeros([WARPS, ROWS, DEPTH], tl.float32)
        if EARLY:
            if SOON:
                gdc_launch_dependents()
            if AHEAD > 0:  # the kernel in front, which still runs, writes x and no weights
                row_bytes: tl.constexpr = k * (w0.dtype.element_ty.primitive_bitwidth // 8)
                _fetch_rows(w0, n0, row_bytes, AHEAD, WARPS * 32)
                _fetch_rows(w1, n1, row_bytes, AHEAD, WARPS * 32)
                _fetch_rows(w2, n2, row_bytes, AHEAD, WARPS * 32)
            gdc_wait()
        for first in range(0, k, WARPS * DEPTH):
            left = channels < k - first
            part = tl.load(x_at + first, mask=is_row[None, :, None] & left, other=0.0)
            if NORM:
                given = part.to(tl.float32)
                squares += given * given
                part = (given * tl.load(norm + first + channels, mask=left, other=0.0).to(tl.float32)).to(part.dtype)
            part, mask = tl.trans(part, (0, 2, 1)), inside[None, :, None] & left
            weights = tl.load(w_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
            sums = tl.dot(weights, part, sums, input_precision="ieee")
            if GATED:
                weights = tl.load(up_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
                up = tl.dot(weights, part, up, input_precision="ieee")
        if AFTER > 0:  # the memory reads on while programs end and others begin
            _fetch_rows(behind, behind_rows, behind_row_bytes, AFTER, WARPS * 32)
        if EARLY and not SOON:
            gdc_launch_dependents()
        width = n0 if GATED else n0 + n1 + n2
        _finish(
            tl.sum(sums, axis=0), tl.sum(up, axis=0), tl.sum(tl.sum(squares, axis=2), axis=0), b, residual, out,
            at + columns, start + columns, inside, is_row, rows, width, residual_m, eps,
            k, HAS_BIAS, GATED, NORM, ADD,
        )  # fmt: skip

    @triton.jit
    def _row_kernel(
        x, w0, w1, w2, b0, b1, b2, norm, residual, behind, out, num_rows, x_m, residual_m, n0, n1, n2, behind_rows,
        behind_row_bytes, eps, k: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        WARPS: tl.constexpr, AHEAD: tl.constexpr, SOON: tl.constexpr, AFTER: tl.constexpr, HAS_BIAS: tl.constexpr,
        GATED: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
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
    behind: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `few_rows`; x [M, K] and `residual` [M, N] of at most `MOST_ROWS` rows on a GPU."""
    (num_rows, k), sizes = x.shape, [len(weight) for weight in weights]
    x, added = (y if y.stride(1) == 1 else y.contiguous() for y in (x, x if residual is None else residual))
    tile = _tile(num_rows, sizes, k, gated, x)
    out = x.new_empty(num_rows, sizes[0] if gated else sum(sizes))
    n0, n1, n2 = (*sizes, 0, 0)[:MOST_WEIGHTS]
    programs = sum(triton.cdiv(n, tile.columns) for n in (sizes[:1] if gated else sizes))
    early, ahead, after = starts_early(x.device), 0, 0
    if early["EARLY"]:
        ahead = min(_fetched_bytes(weight, tile.ahead) for weight in weights)
        after = 0 if behind is None else _fetched_bytes(behind, FETCHED_BYTES // len(behind))
    behind = x if behind is None else behind
    kernel = _row_kernel if num_rows == 1 else _rows_kernel
    kernel[programs,](
        x, *_three(weights), *_three(biases or weights), x if norm is None else norm, added, behind, out,
        num_rows, x.stride(0), added.stride(0), n0, n1, n2, len(behind), behind.stride(0) * behind.element_size(),
        eps, k, ROWS=_padded(num_rows), COLUMNS=tile.columns, DEPTH=tile.depth, WARPS=tile.warps, AHEAD=ahead,
        SOON=tile.soon, AFTER=after, HAS_BIAS=bool(biases), GATED=gated, NORM=norm is not None,
        ADD=residual is not None, num_warps=tile.warps, num_stages=tile.stages, **early,
    )  # fmt: skip
    return out


class _Tile(NamedTuple):
    """What a program takes at once, and when it hands over; measured on an H100 (benchmarks/LOG.md)."""

    columns: int
    depth: int  # channels of a warp, or of all warps for one row
    warps: int
    stages: int
    ahead: int = 0  # bytes of each column that are fetched before the kernel in front has ended
    soon: bool = True  # whether the kernel behind is launched in the beginning, and not when all has been read


def _tile(num_rows: int, sizes: Sequence[int], k: int, gated: bool, x: torch.Tensor) -> _Tile:
    """The tile of a product. Programs are small, so that all multiprocessors have some from beginning to end."""
    width = x.element_size()
    if num_rows == 1:
        return _Tile(2, (1024 if gated else 2048) // width, 4, 2)
    if gated:
        tile = _Tile(32, 128 // width, 2, 3, ahead=256, soon=False)
    elif len(sizes) > 1:
        tile = _Tile(16, 256 // width, 2, 4, ahead=512)
    elif sizes[0] > 8192:
        tile = _Tile(32, 128 // width, 4, 3)
    else:
        tile = _Tile(16, 128 // width, 4, 6, ahead=0 if k > 4096 else 1024)
    loaded = ((1 + gated) * tile.columns + _padded(num_rows)) * tile.depth * tile.warps * width  # for one stage
    shared = cast(Any, torch.cuda.get_device_properties(x.device)).shared_memory_per_block_optin
    return tile._replace(stages=max(1, min(tile.stages, 1 + (shared - 4096) // loaded)))


def _fetched_bytes(weight: torch.Tensor, most: int) -> int:
    """How much of each row of a weight [N, K] can be fetched ahead: whole lines of the L2 cache."""
    row_bytes = weight.stride(0) * weight.element_size()
    if weight.data_ptr() % LINE_BYTES or row_bytes % LINE_BYTES:
        return 0
    return min(row_bytes, most) // LINE_BYTES * LINE_BYTES


def _padded(num_rows: int) -> int:
    """Rows of the tile that takes so many."""
    return 8 if num_rows <= 8 else MOST_ROWS


def _three(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`MOST_WEIGHTS` tensors, some of them again if there are fewer."""
    return [tensors[min(index, len(tensors) - 1)] for index in range(MOST_WEIGHTS)]
