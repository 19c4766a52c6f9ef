"""Attention in which every query sees one or two intervals of the keys, with log-sum-exp to merge two parts.

LRSA's mask has this form: history and window (`buffered.py`). Sequence parallelism may compute the two in different
places and merge them by their log-sum-exp. Shapes: B batch, H query heads, G KV heads, N queries, M keys, D head dim.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import torch

from lrsa_ds.attention.extras import Extras

QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Ahead:
    """The first `count` queries of a sequence, which see only keys `j` with `first_key <= j < first_key + count`."""

    count: int
    first_key: int


@dataclass(frozen=True, eq=False)
class Intervals:
    """Query i sees the keys `lo[i] <= j < hi[i]` and those of `also`, if given; the two do not overlap.

    int32 tensors [N]. Compared by identity, so that they can be keys of caches. A kernel that computes in blocks may
    process the queries `ahead` separately and start its blocks after them: then more blocks are seen in full.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    also: Optional["Intervals"] = None
    ahead: Ahead = Ahead(0, 0)


def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B, H, N, D] over the keys that each query sees of k, v [B, G, M, D]: the readable form.

    Returns:
        Output [B, H, N, D] in the dtype of `q`, and log-sum-exp of the scaled and capped scores, without sinks, fp32
        [B, H, N]. A query that sees no key has output 0, log-sum-exp -inf, and no gradient.
    """
    parts = [intervals] if intervals.also is None else [intervals, intervals.also]
    outputs, lses = [], []
    for rows in torch.arange(q.shape[2], device=q.device).split(QUERIES_AT_ONCE):
        ends = [(part.lo[rows], part.hi[rows]) for part in parts]
        # The keys that any of these queries sees, for each part. Both may include the same key; a query sees it in one.
        spans = [_span(lo, hi) for lo, hi in ends]
        keys, values = (torch.cat([x[:, :, first:last] for first, last in spans], dim=2) for x in (k, v))
        visible = torch.cat([sees(*pair, *span) for pair, span in zip(ends, spans, strict=True)], dim=1)
        out, lse = attend_visible(q[:, :, rows], keys, values, visible, extras)
        outputs.append(out)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def attend_visible(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where `visible`, bool [..., N, M], says which keys each query sees. Computes in fp32 or fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = extras.capped((q.to(dtype) @ k.mT) * extras.scale_of(q.shape[3]))
    # Queries that see no key keep finite scores, which avoids NaN, and are cleared afterwards.
    scores = scores.masked_fill(~visible & ~empty, -torch.inf)
    out = (scores.softmax(-1) @ v).masked_fill(empty, 0).to(q.dtype)
    return out, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def sees(lo: torch.Tensor, hi: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Which of the keys in [first, last) each query sees: bool [N, last - first]."""
    key_index = torch.arange(first, last, device=lo.device)
    return (key_index >= lo[:, None]) & (key_index < hi[:, None])


def _span(lo: torch.Tensor, hi: torch.Tensor) -> tuple[int, int]:
    """The smallest interval that contains all non-empty intervals; at least one key long."""
    full = hi > lo
    if not full.any():
        return 0, 1
    return int(lo[full].min()), int(hi[full].max())


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Attention over the keys of two parts, from the output and log-sum-exp of each, in fp32; differentiable.

    Every query must see a key in `first`; it may see none in `second`.
    """
    combine = _compiled_merge() if first[0].is_cuda else _merge
    return combine(*first, *second, dtype)


@lru_cache(maxsize=1)
def _compiled_merge():
    """One kernel per direction, instead of a dozen that each read and write fp32 copies."""
    return torch.compile(_merge, dynamic=False, fullgraph=True)


def _merge(out_a, lse_a, out_b, lse_b, dtype: torch.dtype) -> torch.Tensor:
    share_b = torch.sigmoid(lse_b.float() - lse_a.float())[..., None]
    return (out_a.float() + share_b * (out_b.float() - out_a.float())).to(dtype)
