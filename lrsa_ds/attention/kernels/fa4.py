"""Interval attention on flash-attn-4's block-sparse kernels for NVIDIA Hopper (the extra `fa4`).

Blocks that queries see in full run without a mask. In the others the mask compares keys with the ends of the
intervals, which it reads from tensors, so one compilation serves all layouts. flash-attn-4 takes [B, N, H, D].
"""

import importlib.metadata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.blocks import BLOCK, as_lists, block_cover, interval_rows
from lrsa_ds.attention.kernels.interval import Intervals, sees

if TYPE_CHECKING:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

# Keys in a block, for each head dim that is supported: those in a tile of flash-attn-4's kernels, whose shared memory
# has no room for more at head dim 256.
KEYS_IN_BLOCK = {64: BLOCK, 128: BLOCK, 256: 64}
RELEASE = "4.0.0b36"  # pinned, also in pyproject.toml: functions below the public interface are called


def what_fa4_misses(device: torch.device) -> str | None:
    """Why flash-attn-4 cannot run on a CUDA device, whatever the tensors; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it is used on Hopper (compute capability 9.0), and this GPU has {capability[0]}.{capability[1]}"
    if (installed := _installed_release()) != RELEASE:
        return f"flash-attn-4 {RELEASE} is needed (pip install 'lrsa-ds[fa4]'), and {installed or 'none'} is installed"
    return None


@lru_cache(maxsize=1)
def _installed_release() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def fa4_interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function as `interval_attention`, with the same shapes; the table of kernels has its limits."""
    return _Attention.apply(q, k, v, intervals, extras.scale)


class _Attention(torch.autograd.Function):
    """flash-attn-4's autograd function, for queries that do not begin at the start of their tensor.

    It calls functions below the public interface: through the public function, output and gradients of the queries
    ahead and of the queries in blocks would have to be concatenated, which copies them.
    """

    @staticmethod
    def forward(ctx, q, k, v, intervals, scale):
        from flash_attn.cute.interface import _flash_attn_fwd

        from lrsa_ds.attention.kernels.fa4_mask import forward_mask, interval_kernels

        layout = _block_layout(intervals, k.shape[2], KEYS_IN_BLOCK[q.shape[3]])
        scale = q.shape[3] ** -0.5 if scale is None else scale
        out = q.new_empty(q.shape[0], q.shape[2], *q.shape[1::2]).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        _, in_blocks = layout.split
        with interval_kernels():
            _flash_attn_fwd(
                *(x.transpose(1, 2) for x in (q[:, :, in_blocks], k, v)),
                softmax_scale=scale,
                mask_mod=forward_mask,
                aux_tensors=layout.rows,
                block_sparse_tensors=layout.by_query,
                return_lse=True,
                out=out[:, :, in_blocks].transpose(1, 2),
                lse=lse[:, :, in_blocks],
            )
        if layout.visible_ahead is not None:
            _attend_ahead(q, k, v, layout, scale, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, *gradients):
        from flash_attn.cute.interface import _flash_attn_bwd

        from lrsa_ds.attention.kernels.fa4_mask import backward_mask, interval_kernels

        q, k, v, out, lse = ctx.saved_tensors
        layout = ctx.layout
        _, in_blocks = layout.split
        grad_out, grad_lse = gradients
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_q = torch.empty_like(out)
        q_, out_, grad_ = (x[:, :, in_blocks] for x in (q, out, grad_out))
        with interval_kernels():
            _, grad_k, grad_v = _flash_attn_bwd(
                *(x.transpose(1, 2) for x in (q_, k, v, out_, grad_)),
                lse[:, :, in_blocks],
                ctx.scale,
                mask_mod=backward_mask,
                aux_tensors=layout.rows,
                block_sparse_tensors=layout.by_key,
                dq=grad_q[:, :, in_blocks].transpose(1, 2),
                dlse=None if grad_lse is None else grad_lse[:, :, in_blocks],
            )
        inputs = grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2)
        if layout.visible_ahead is not None:
            _add_gradients_ahead(q, k, v, layout, ctx.scale, grad_out, grad_lse, inputs)
        return *inputs, None, None


@torch.no_grad()
def _attend_ahead(q, k, v, layout: "_BlockLayout", scale: float, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Writes output and log-sum-exp of the queries ahead."""
    (ahead, _), visible = layout.split, layout.visible_ahead
    assert visible is not None
    keys, values = (x[:, :, layout.keys_ahead] for x in (k, v))
    out[:, :, ahead], lse[:, :, ahead] = _attend_densely(q[:, :, ahead], keys, values, visible, scale)


def _add_gradients_ahead(q, k, v, layout: "_BlockLayout", scale: float, grad_out, grad_lse, gradients) -> None:
    """Writes the gradients of the queries ahead, and adds those of the keys and values that they see."""
    (ahead, _), keys, visible = layout.split, layout.keys_ahead, layout.visible_ahead
    assert visible is not None
    parts = q_, k_, v_ = [x.detach().requires_grad_() for x in (q[:, :, ahead], k[:, :, keys], v[:, :, keys])]
    with torch.enable_grad():
        out, lse = _attend_densely(q_, k_, v_, visible, scale)
    upstream = [grad_out[:, :, ahead], torch.zeros_like(lse) if grad_lse is None else grad_lse[:, :, ahead]]
    grad_q, grad_k, grad_v = torch.autograd.grad((out, lse), parts, upstream)
    gradients[0][:, :, ahead] = grad_q
    gradients[1][:, :, keys] += grad_k
    gradients[2][:, :, keys] += grad_v


def _attend_densely(q, k, v, visible: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries over a few keys; `visible` [queries, keys] is the mask."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.mT * scale).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1)


@dataclass(frozen=True)
class _BlockLayout:
    """The input of flash-attn-4 for given intervals; queries are either ahead or in blocks."""

    split: tuple[slice, slice]  # queries ahead, and queries in blocks
    rows: list[torch.Tensor]  # the ends of the intervals of the queries in blocks
    by_query: "BlockSparseTensorsTorch"  # for the forward pass
    by_key: "BlockSparseTensorsTorch"  # for the backward pass
    keys_ahead: slice
    visible_ahead: torch.Tensor | None  # bool [queries ahead, keys ahead]; None if there are none


@lru_cache(maxsize=64)
def _block_layout(intervals: Intervals, num_keys: int, keys_in_block: int) -> _BlockLayout:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    count, first_key, window = intervals.ahead.count, intervals.ahead.first_key, intervals.also
    rows = interval_rows(intervals, count)
    partly, wholly = block_cover(rows, num_keys, keys_in_block)

    def table(partly: torch.Tensor, wholly: torch.Tensor, descending: bool) -> BlockSparseTensorsTorch:
        lists = (*_short(partly, descending), *_short(wholly, descending))
        return BlockSparseTensorsTorch(*lists, block_size=(BLOCK, keys_in_block))

    keys, visible_ahead = slice(first_key, first_key + count), None
    if count:
        assert window is not None, "queries ahead see a part of their window"
        visible_ahead = sees(window.lo[:count], window.hi[:count], keys.start, keys.stop)
    # In the backward pass, blocks of keys that end with the same queries run from last to first: L2 cache hits.
    return _BlockLayout(
        split=(slice(0, count), slice(count, None)),
        rows=list(rows.unbind()),
        by_query=table(partly, wholly, False),
        by_key=table(partly.mT, wholly.mT, True),
        keys_ahead=keys,
        visible_ahead=visible_ahead,
    )


def _short(blocks: torch.Tensor, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `as_lists`, without the columns that are unused in all rows."""
    counts, columns = as_lists(blocks, descending)
    columns = columns[..., : max(1, int(counts.max()))]
    # Always a copy, since flash-attn-4 needs a last stride of 1 even for a single column.
    return counts, columns.clone(memory_format=torch.contiguous_format)
