"""The attention functions that `benchmark.py` times beside LRSA: dense kernels, and a public trainable sparse one."""

import importlib.util
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lrsa_ds.attention.partition import PartitionTable
from lrsa_ds.registry import KERNELS

DenseMethod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
NSA_BLOCK = 64  # keys of a block that a query selects, as in the paper of native sparse attention (arXiv 2502.11089)


def sdpa(backend: SDPBackend) -> DenseMethod:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def dense_fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0].transpose(1, 2)


def dense_methods(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, DenseMethod]:
    methods = {"dense cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "dense flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    reason = KERNELS["fa4"].why_not(device, dtype, dim)
    return methods if reason else methods | {"dense fa4": dense_fa4}


def has_nsa() -> bool:
    return importlib.util.find_spec("native_sparse_attention_pytorch") is not None


def nsa(table: PartitionTable) -> DenseMethod:
    """The selected-blocks branch of native-sparse-attention-pytorch, at as many keys a query as LRSA under `table`.

    Which blocks are selected does not change the time, so they are drawn by lot; what it takes to choose them is not
    counted. It computes in fp16.
    """
    from native_sparse_attention_pytorch.triton_native_sparse_attention import native_sparse_attend

    def attend(q, k, v):
        blocks, mask = _blocks(table, k.shape[1], q.device)
        return native_sparse_attend(q, k, v, NSA_BLOCK, blocks, mask, block_dk_dv_use_dot=True)

    return attend


def blocks_a_query(table: PartitionTable) -> int:
    """Selected blocks of each query that make as many pairs as LRSA has, besides its own block."""
    before = torch.arange(table.num_tokens) // NSA_BLOCK  # blocks that there are before a query's own
    wanted = table.num_pairs / NSA_BLOCK
    low, high = 1, table.num_tokens // NSA_BLOCK
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if before.clamp(max=middle).sum() < wanted else (low, middle)
    return low


@lru_cache(maxsize=1)
def _blocks(table: PartitionTable, num_heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [1, G, N, count] and which of them a query has: consecutive ones from a random one on, wrapping around."""
    count = blocks_a_query(table)
    before = (torch.arange(table.num_tokens, device=device) // NSA_BLOCK)[:, None]
    first = (torch.rand(1, num_heads, table.num_tokens, 1, device=device) * before).long()
    places = torch.arange(count, device=device)
    return (first + places) % before.clamp(min=1), (places < before).expand(1, num_heads, -1, -1).contiguous()
