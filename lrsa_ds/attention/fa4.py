"""Interval attention on flash-attn-4's block-sparse kernels for NVIDIA Hopper (the extra `fa4`).

Blocks that queries see in full run unmasked; in the others the mask compares the key with the ends of the query's
intervals, which it reads from tensors: one compilation serves every layout. flash-attn-4 is called with [B, N, H, D].
"""

import importlib.util
from functools import lru_cache

import torch

from lrsa_ds.attention.blocks import BLOCK, as_lists, block_cover, interval_rows
from lrsa_ds.attention.interval import Intervals

HEAD_DIMS = (64, 128)


def why_not_fa4(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What stands against flash-attn-4 for such tensors, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it is used on Hopper (compute capability 9.0), and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"head dims {' and '.join(map(str, HEAD_DIMS))} are supported, not {head_dim}"
    if not _is_installed():
        return "flash-attn-4 is not installed (pip install 'lrsa-ds[fa4]')"
    return None


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    # Earlier releases of flash-attn have the same top level, and no `cute` below it.
    return importlib.util.find_spec("flash_attn") is not None and (
        importlib.util.find_spec("flash_attn.cute") is not None
    )


def fa4_interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function as `interval_attention`. Shapes as there; see `why_not_fa4` for what it takes."""
    from flash_attn.cute import flash_attn_func

    rows, forward, backward = _block_tables(intervals, k.shape[2])
    out, lse = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        mask_mod=_mask(),
        aux_tensors=list(rows.unbind()),
        block_sparse_tensors=forward,
        block_sparse_tensors_bwd=backward,
        return_lse=True,
    )
    return out.transpose(1, 2), lse


@lru_cache(maxsize=64)
def _block_tables(intervals: Intervals, num_keys: int):
    """The ends of the intervals, and the tables of blocks by query (forward) and by key (backward)."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    rows = interval_rows(intervals)
    partly, wholly = block_cover(rows, num_keys)

    def table(partly: torch.Tensor, wholly: torch.Tensor, descending: bool) -> BlockSparseTensorsTorch:
        lists = (*_short(partly, descending), *_short(wholly, descending))
        return BlockSparseTensorsTorch(*lists, block_size=(BLOCK, BLOCK))

    # Backward, blocks of keys that end with the same queries walk from the last to the first, and so meet in the cache.
    return rows, table(partly, wholly, False), table(partly.mT, wholly.mT, True)


def _short(blocks: torch.Tensor, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `as_lists`, without the columns that no row fills."""
    counts, columns = as_lists(blocks, descending)
    columns = columns[..., : max(1, int(counts.max()))]
    # A copy in any case, since flash-attn-4 wants a last stride of 1 even where there is a single column.
    return counts, columns.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1)
def _mask():
    """The mask of partly seen blocks, in the language of CuTe."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def sees(batch, head, q_index, kv_index, seqlen_info, rows):
        a_lo = scalar_to_ssa(rows[0][q_index[0]], cutlass.Int32)
        a_hi = scalar_to_ssa(rows[1][q_index[0]], cutlass.Int32)
        b_lo = scalar_to_ssa(rows[2][q_index[0]], cutlass.Int32)
        b_hi = scalar_to_ssa(rows[3][q_index[0]], cutlass.Int32)
        in_a = (kv_index >= a_lo) & (kv_index < a_hi)
        in_b = (kv_index >= b_lo) & (kv_index < b_hi)
        return in_a | in_b

    return sees
