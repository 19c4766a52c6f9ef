"""Attention in which every query sees one interval of the keys, with the log-sum-exp that merges two such parts.

Sequence parallelism computes the history and the window of a query in different places and joins them by their
log-sum-exp. Shapes: B batch, H query heads, G KV heads, N queries, M keys, D head dim.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lrsa_ds.attention.flex import BLOCK, compiled_flex_attention, interval_block_mask

QUERIES_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Intervals:
    """Query i sees keys `lo[i] <= j < hi[i]`: int32 tensors [N]. Compared by identity, so that caches may hold it."""

    lo: torch.Tensor
    hi: torch.Tensor


def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query of q [B, H, N, D] attends to its interval of k, v [B, G, M, D]: the readable form.

    Returns:
        Output [B, H, N, D] in the dtype of `q`, and log-sum-exp of the scaled scores, fp32 [B, H, N]. A query with an
        empty interval gets output 0 and log-sum-exp -inf, and gives no gradient.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    outputs, lses = [], []
    for rows in torch.arange(q.shape[2], device=q.device).split(QUERIES_AT_ONCE):
        lo, hi = intervals.lo[rows], intervals.hi[rows]
        first, last = _span(lo, hi)
        keys, values = (x[:, :, first:last].repeat_interleave(group, dim=1) for x in (k, v))
        key_index = torch.arange(first, last, device=q.device)
        visible = (key_index >= lo[:, None]) & (key_index < hi[:, None])
        empty = ~visible.any(dim=1)
        scores = (q[:, :, rows].float() @ keys.float().mT) * scale
        # Rows that see nothing keep finite scores, so that no NaN arises, and are cleared afterwards.
        scores = scores.masked_fill(~visible & ~empty[:, None], -torch.inf)
        outputs.append((scores.softmax(-1) @ values.float()).masked_fill(empty[:, None], 0).to(q.dtype))
        lses.append(scores.logsumexp(-1).masked_fill(empty, -torch.inf))
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _span(lo: torch.Tensor, hi: torch.Tensor) -> tuple[int, int]:
    """The least interval that holds all non-empty ones, of one key at least."""
    full = hi > lo
    if not full.any():
        return 0, 1
    return int(lo[full].min()), int(hi[full].max())


def flex_interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function on FlexAttention, compiled on CUDA."""
    attend = compiled_flex_attention() if q.is_cuda else flex_attention
    num_queries = q.shape[2]
    if num_queries < BLOCK:
        # The kernel needs a whole block of queries: the missing ones see nothing and are cut off again.
        q = torch.nn.functional.pad(q, (0, 0, 0, BLOCK - num_queries))
    mask = _block_mask(intervals, k.shape[2])
    gqa = q.shape[1] != k.shape[1]
    out, aux = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    return out[:, :, :num_queries], aux.lse[:, :, :num_queries]


@lru_cache(maxsize=64)
def _block_mask(intervals: Intervals, num_keys: int) -> BlockMask:
    nothing = torch.zeros_like(intervals.lo)
    rows = torch.stack([intervals.lo, intervals.hi, nothing, nothing])
    rows = torch.nn.functional.pad(rows, (0, max(0, BLOCK - rows.shape[1])))
    return interval_block_mask(rows, num_keys)


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Attention over the keys of both parts, from the output and log-sum-exp of each, in fp32; differentiable.

    Every query must see something in `first`; it may see nothing in `second`.
    """
    (out_a, lse_a), (out_b, lse_b) = first, second
    share_b = torch.sigmoid(lse_b.float() - lse_a.float())[..., None]
    return torch.lerp(out_a.float(), out_b.float(), share_b).to(dtype)
