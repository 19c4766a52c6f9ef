"""LagKV's selection in two Triton kernels.

The readable form is `lagkv.py`. Both compute fp32 scores from the same keys and values, and break ties alike. They sum
in another order, so scores that differ only by rounding may be ranked differently. Shapes as there.
"""

import importlib.util

import torch

from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.lrsa_config import LRSAConfig

# Elements that a program processes at once: on an H100, 32,768 took 0.77 of the time of 8,192.
TILE = 32768
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _deviation_kernel(
        k, v, k_b, k_g, k_n, v_b, v_g, v_n, starts, out, num_heads, num_partitions,
        copied_k, copied_v, copied_rows, first_row,
        lag: tl.constexpr, dim: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, COPY: tl.constexpr,
    ):  # fmt: skip
        """Standard deviation of each token over its channels, normalised by the lag reference: [2, B * G, P, L].

        Keys first, then values. With COPY, the tokens of the partitions are also written to [B * G, copied_rows, D],
        after the first `first_row` rows, since they are read anyway.
        """
        head, partition, which = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        tokens, channels = tl.arange(0, TOKENS), tl.arange(0, DIM)
        is_channel = channels < dim
        base = k + (head // num_heads) * k_b + (head % num_heads) * k_g
        stride_n, copied = k_n, copied_k
        if which == 1:
            base = v + (head // num_heads) * v_b + (head % num_heads) * v_g
            stride_n, copied = v_n, copied_v
        base += channels[None, :]
        start = tl.load(starts + partition)
        low, high = tl.full([DIM], float("inf"), tl.float32), tl.full([DIM], float("-inf"), tl.float32)
        for first in range(0, lag, TOKENS):
            inside = (first + tokens < lag)[:, None] & is_channel[None, :]
            values = tl.load(base + (start + lag + first + tokens)[:, None] * stride_n, mask=inside).to(tl.float32)
            low = tl.minimum(low, tl.min(tl.where(inside, values, float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.where(inside, values, float("-inf")), axis=0))
        # A channel that is constant in the reference cannot be normalised: it counts as 0.
        spread = tl.where(high > low, high - low, float("inf"))
        for first in range(0, lag, TOKENS):
            inside = (first + tokens < lag)[:, None] & is_channel[None, :]
            values = tl.load(base + (start + first + tokens)[:, None] * stride_n, mask=inside, other=0.0)
            if COPY:
                row = head * copied_rows + first_row + start + first + tokens
                tl.store(copied + row[:, None] * dim + channels[None, :], values, mask=inside)
            scaled = tl.where(inside, (values.to(tl.float32) - low[None, :]) / spread[None, :], 0.0)
            centred = tl.where(inside, scaled - (tl.sum(scaled, axis=1) / dim)[:, None], 0.0)
            deviation = tl.sqrt(tl.sum(centred * centred, axis=1) / (dim - 1))
            # A deviation that overflows becomes the largest one.
            deviation = tl.where(deviation < 3.4028234663852886e38, deviation, 3.4028234663852886e38)
            row = ((which * tl.num_programs(0) + head) * num_partitions + partition) * lag
            tl.store(out + row + first + tokens, deviation, mask=first + tokens < lag)

    @triton.jit
    def _keep_kernel(
        deviations, row_size, starts, slots, kept, kept_stride, slot_of, num_tokens, num_partitions,
        value_weight, lag: tl.constexpr, num_kept, LAG: tl.constexpr, INVERSE: tl.constexpr,
    ):  # fmt: skip
        """Writes the positions with the `num_kept` highest scores of a partition, ascending.

        They go to slot `slots[partition]` and the next ones.

        Ties go to the lower position. With INVERSE, the slot of each kept token is written as well.
        """
        row, tokens = tl.program_id(0).to(tl.int64), tl.arange(0, LAG)
        is_token = tokens < lag
        score = tl.zeros([LAG], tl.float32)
        for part in tl.static_range(2):
            at = deviations + part * row_size + row * lag + tokens
            deviation = tl.load(at, mask=is_token, other=float("-inf"))
            weight = tl.exp(deviation - tl.max(deviation, axis=0))
            share = weight / tl.sum(weight, axis=0)
            score += share if part == 0 else value_weight * share
        # Floats that are not negative are ordered like their bits: find the num_kept-th largest bit by bit.
        bits = tl.where(is_token, score.to(tl.int32, bitcast=True), -1)
        threshold = tl.zeros([1], tl.int32)
        for place in tl.static_range(31):
            candidate = threshold + (1 << (30 - place))
            is_low_enough = tl.sum((bits >= candidate).to(tl.int32), axis=0) >= num_kept
            threshold = tl.where(is_low_enough, candidate, threshold)
        above, equal = bits > threshold, bits == threshold
        num_equal = num_kept - tl.sum(above.to(tl.int32), axis=0)
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= num_equal))
        place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
        head, partition = row // num_partitions, row % num_partitions
        token, slot = tl.load(starts + partition) + tokens, tl.load(slots + partition) + place
        tl.store(kept + head * kept_stride + slot, token, mask=keep)
        if INVERSE:
            tl.store(slot_of + head * num_tokens + token, slot.to(tl.int32), mask=keep)


@torch.no_grad()
def fused_select_into(
    positions: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    partitions: Partitions,
    slots_P: torch.Tensor,
    config: LRSAConfig,
    layer: int,
    slot_of: torch.Tensor | None = None,
    copies: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See `FusedSelection`; `layer` is not used."""
    starts_P, lag, num_tokens = partitions.starts, config.lag_size, k.shape[2]
    batch, heads, num_partitions = *k.shape[:2], len(partitions)
    num_rows = batch * heads * num_partitions
    deviations = torch.empty(2, num_rows, lag, dtype=torch.float32, device=k.device)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    dim = k.shape[3]
    width = triton.next_power_of_2(dim)
    tile = max(16, min(triton.next_power_of_2(lag), TILE // width))
    strides = (*k.stride()[:3], *v.stride()[:3])
    copied_k, copied_v = copies or (k, v)
    copied_rows = copied_k.shape[2]
    _deviation_kernel[batch * heads, num_partitions, 2](
        k, v, *strides, starts_P, deviations, heads, num_partitions, copied_k, copied_v, copied_rows,
        copied_rows - num_tokens, lag, dim, TOKENS=tile, DIM=width, COPY=copies is not None, num_warps=4,
    )  # fmt: skip
    _keep_kernel[(num_rows,)](
        deviations,
        num_rows * lag,
        starts_P,
        slots_P,
        positions,
        positions.shape[2],
        positions if slot_of is None else slot_of,
        num_tokens,
        num_partitions,
        float(config.value_weight),  # an int would be compiled as a constant
        lag,
        config.num_kept,
        LAG=triton.next_power_of_2(lag),
        INVERSE=slot_of is not None,
        num_warps=4,
    )
