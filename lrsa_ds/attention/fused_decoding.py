"""`attend_entries` in two Triton kernels: the entries are split over the GPU, and the parts are joined.

One token has too few queries to fill a GPU: so each program takes some entries of a KV head for all its query heads
(flash decoding). How many are filled is read on the device. The readable form is in `decoding.py`.
"""

import importlib.util
from functools import cache

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
TILE_BYTES = 16384  # of keys, or of values, that a program reads at once
PROGRAMS = 396  # three for each multiprocessor of an H100
JOINED_CHANNELS = 32  # that a program joins: all parts fit into its registers

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def _angles(cos, sin, channels, dim: tl.constexpr):
        """Cosine and sine fp32 [DIM] by which channel c is rotated in a pair with c + dim / 2."""
        is_low, is_channel = channels < dim // 2, channels < dim
        cosine = tl.load(cos + channels, mask=is_channel, other=0.0).to(tl.float32)
        sine = tl.load(sin + channels, mask=is_channel, other=0.0).to(tl.float32)
        return cosine, tl.where(is_low, -sine, sine)

    @triton.jit
    def _loaded(at, mask, cosine, sine, channels, dim: tl.constexpr, ROTATE: tl.constexpr):
        """Vectors at `at` [rows, DIM], rotated if ROTATE: see `_angles`."""
        x = tl.load(at, mask=mask, other=0.0)
        if ROTATE:
            other = tl.load(at + tl.where(channels < dim // 2, dim // 2, -(dim // 2))[None, :], mask=mask, other=0.0)
            x = (x.to(tl.float32) * cosine[None, :] + other.to(tl.float32) * sine[None, :]).to(x.dtype)
        return x

    @triton.jit
    def _attended(
        queries, k, v, k_n, v_n, start, end, scale, is_channel, GROUP: tl.constexpr, DIM: tl.constexpr,
        TILE: tl.constexpr,
    ):  # fmt: skip
        """Attention of queries [GROUP, DIM] over entries `start` to `end`: output fp32 and log-sum-exp [GROUP]."""
        tokens = tl.arange(0, TILE)
        largest = tl.full([GROUP], float("-inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        output = tl.zeros([GROUP, DIM], tl.float32)
        for at in range(start, end, TILE):
            entries, inside = (at + tokens).to(tl.int64), at + tokens < end
            mask = inside[:, None] & is_channel[None, :]
            keys = tl.load(k + entries[:, None] * k_n, mask=mask, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            shares = tl.exp(scores - new_largest[:, None])
            shrink = tl.exp(largest - new_largest)
            total = total * shrink + tl.sum(shares, axis=1)
            values = tl.load(v + entries[:, None] * v_n, mask=mask, other=0.0)
            output = output * shrink[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
            largest = new_largest
        total = tl.where(total == 0.0, 1.0, total)  # a part without entries weighs exp(-inf)
        output = output / total[:, None]
        return output, largest + tl.log(total)

    @triton.jit
    def _part_kernel(
        q, k, v, new_k, new_v, cos, sin, first, last, outputs, weights, scale, cos_b, sin_b, q_b, q_h, k_b, k_g, k_n,
        v_b, v_g, v_n, new_k_b, new_k_g, new_v_b, new_v_g, num_heads, num_splits, dim: tl.constexpr,
        group: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, STORE: tl.constexpr,
        ROTATE: tl.constexpr, KNOWN: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """Attention of the `group` query heads of a KV head over one part of its entries.

        Writes outputs fp32 [B * G, splits, group, D], and log-sum-exps fp32 [B * G, splits, group] into `weights`. With
        STORE, the last entry is `new_k` and `new_v`; the only program that attends to it also writes it. With
        ROTATE, queries and `new_k` are first rotated by their positions. KNOWN: the rotation was there before the
        kernel in front began. EARLY: see `starts_early`.
        """
        head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, kv_head = head // num_heads, head % num_heads
        members, channels = tl.arange(0, GROUP), tl.arange(0, DIM)
        is_member, is_channel = members < group, channels < dim
        start, end = tl.load(first + row).to(tl.int32), tl.load(last).to(tl.int32) + 1
        cosine, sine = 0.0, 0.0
        if EARLY:
            gdc_launch_dependents()
            if not KNOWN:
                gdc_wait()  # what a step changes between its kernels is read after it
        if ROTATE:
            cosine, sine = _angles(cos + row * cos_b, sin + row * sin_b, channels, dim)
        if EARLY and KNOWN:
            gdc_wait()
        q_at = q + row * q_b + (kv_head * group + members)[:, None] * q_h + channels[None, :]
        queries = _loaded(q_at, is_member[:, None] & is_channel[None, :], cosine, sine, channels, dim, ROTATE)
        size = tl.cdiv(end - start, num_splits)
        if size <= 2 * TILE:  # whole tiles, of which each costs the same
            size = tl.cdiv(size, TILE) * TILE
        place = end - 1
        start += split * size
        end = tl.minimum(end, start + size)
        k += row * k_b + kv_head * k_g + channels[None, :]
        v += row * v_b + kv_head * v_g + channels[None, :]
        if STORE:
            own_k_at = new_k + row * new_k_b + kv_head * new_k_g + channels[None, :]
            own_k = _loaded(own_k_at, is_channel[None, :], cosine, sine, channels, dim, ROTATE)
            own_v = tl.load(new_v + row * new_v_b + kv_head * new_v_g + channels, mask=is_channel, other=0.0)
            writes = is_channel & (start <= place) & (place < end)
            tl.store(k + place.to(tl.int64) * k_n, own_k, mask=writes[None, :])
            tl.store(v + place.to(tl.int64) * v_n, own_v[None, :], mask=writes[None, :])
            tl.debug_barrier()  # other threads of the program read them
        output, weight = _attended(queries, k, v, k_n, v_n, start, end, scale, is_channel, GROUP, DIM, TILE)
        at = (head * num_splits + split) * group + members
        tl.store(weights + at, weight, mask=is_member)
        tl.store(outputs + at[:, None] * dim + channels[None, :], output, mask=is_member[:, None] & is_channel[None, :])

    @triton.jit
    def _join_kernel(
        outputs, weights, joined, num_splits, dim: tl.constexpr, group: tl.constexpr,
        SPLITS: tl.constexpr, CHANNELS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """The parts of one query head by their log-sum-exps, some channels of [B * H, D] in the dtype of `joined`."""
        head, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
        splits, channels = tl.arange(0, SPLITS), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        at, is_split, is_channel = (head * num_splits + splits) * group + member, splits < num_splits, channels < dim
        if EARLY:
            gdc_wait()
        weight = tl.load(weights + at, mask=is_split, other=float("-inf"))
        mask = is_split[:, None] & is_channel[None, :]
        parts = tl.load(outputs + at[:, None] * dim + channels[None, :], mask=mask, other=0.0)
        share = tl.exp(weight - tl.max(weight, axis=0))
        output = tl.sum(parts * share[:, None], axis=0) / tl.sum(share, axis=0)
        place = joined + (head * group + member) * dim + channels
        tl.store(place, output.to(joined.dtype.element_ty), mask=is_channel)


@cache
def starts_early(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that is launched while the kernel in front still runs, and waits for it (EARLY), if possible.

    A chain of short kernels then has no gaps (programmatic dependent launch, from compute capability 9.0 on).
    """
    is_early = torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": is_early} | ({"launch_pdl": True} if is_early else {})


def fused_attend_entries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    scale: float | None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    is_known: bool = False,
) -> torch.Tensor:
    """See `attend_entries`; keys and values of one shape, on a GPU.

    Args:
        new: key and value [B, G, 1, D] of the entry `last`, which are written into `k` and `v`.
        rotation: cosine and sine, [B or 1, 1, 1, D], by which `q` and the new key are still to be rotated.
        is_known: whether the rotation was there before the kernel in front of this one began.
    """
    batch, num_heads, _, dim = q.shape
    num_kv_heads, group = k.shape[1], num_heads // k.shape[1]
    new_k, new_v = (x if x.stride(-1) == 1 else x.contiguous() for x in new or (q, q))
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in rotation or (q, q))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    width = max(16, triton.next_power_of_2(dim))  # the least that a product in Triton sums over
    tile = max(16, min(64, TILE_BYTES // (width * k.element_size())))
    splits = max(1, min(PROGRAMS // (batch * num_kv_heads), -(-k.shape[2] // tile)))
    outputs = torch.empty(batch * num_kv_heads, splits, group, dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(batch * num_kv_heads, splits, group, dtype=torch.float32, device=q.device)
    joined = torch.empty_like(q, memory_format=torch.contiguous_format)
    _part_kernel[batch * num_kv_heads, splits](
        q, k, v, new_k, new_v, cos, sin, first, last, outputs, weights, float(dim**-0.5 if scale is None else scale),
        *(x.stride(0) if len(x) > 1 else 0 for x in (cos, sin)),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *new_k.stride()[:2], *new_v.stride()[:2],
        num_kv_heads, splits, dim, group,
        GROUP=max(16, triton.next_power_of_2(group)), DIM=width, TILE=tile, STORE=new is not None,
        ROTATE=rotation is not None, KNOWN=is_known, num_warps=4, num_stages=2, **starts_early(q.device),
    )  # fmt: skip
    channels = min(width, JOINED_CHANNELS)
    _join_kernel[batch * num_kv_heads, group, triton.cdiv(dim, channels)](
        outputs, weights, joined, splits, dim, group,
        SPLITS=triton.next_power_of_2(splits), CHANNELS=channels,
        num_warps=8 if splits > 128 else 4 if splits > 32 else 2, **starts_early(q.device),
    )  # fmt: skip
    return joined
