"""LRSA attention as a plain loop over chunks: the readable definition, and the oracle for all faster backends."""

from collections.abc import Iterable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kept_buffer import buffer_positions, gather_kept
from lrsa_ds.attention.kernels.interval import attend_visible
from lrsa_ds.attention.partition import Chunk, PartitionTable
from lrsa_ds.attention.saved_outputs import attend_once


def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: PartitionTable,
    extras: Extras = PLAIN,
    layer: int = 0,
) -> torch.Tensor:
    """Attention of q [B, H, N, D] over k, v [B, G, N, D] as `table` defines it: [B, H, N, D]. H is a multiple of G.

    Here and below values may have another head dim than queries and keys; the output has that of the values.
    """
    positions = buffer_positions(k, v, table, layer)
    return attend_chunks(q, k, v, gather_kept(k, positions), gather_kept(v, positions), table.chunks, extras)


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept_k: torch.Tensor,
    kept_v: torch.Tensor,
    chunks: Iterable[Chunk],
    extras: Extras,
    first_query: int = 0,
    first_key: int = 0,
) -> torch.Tensor:
    """Attention of each chunk's queries over its part of the kept buffer and its window, in a loop: [B, H, n, D].

    Args:
        kept_k, kept_v: the kept buffer, [B, G, R, D].
        first_query, first_key: the first token of `q`, and of `k` and `v`; the chunks count from token 0.
    """
    outputs = []
    for chunk in chunks:
        history, window = slice(chunk.hist_lo, chunk.hist_hi), slice(chunk.win_lo - first_key, chunk.q_hi - first_key)
        keys = torch.cat([kept_k[:, :, history], k[:, :, window]], dim=2)
        values = torch.cat([kept_v[:, :, history], v[:, :, window]], dim=2)
        queries = q[:, :, chunk.q_lo - first_query : chunk.q_hi - first_query]
        outputs.append(attend_causally(queries, keys, values, extras))
    return torch.cat(outputs, dim=2)


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> torch.Tensor:
    """Attention of queries that belong to the last keys: each sees all keys up to its own."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    # With as many keys as queries no mask is needed: SDPA has fast kernels for plain causal attention.
    square = num_keys == num_queries
    if extras.is_plain and (square or num_queries == 1):
        gqa = q.shape[1] != k.shape[1]
        attend = partial(scaled_dot_product_attention, is_causal=square, scale=extras.scale, enable_gqa=gqa)
        return attend_once(attend, q, k, v)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    return attend_masked(q, k, v, visible, extras)


def attend_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, extras: Extras
) -> torch.Tensor:
    """Attention of each query over the keys that it sees, as `visible`, bool [N, M], says; each sees one at least."""
    if not extras.is_plain:
        return extras.with_sinks(*attend_visible(q, k, v, visible, extras))[0]
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda:
        # No fused kernel of SDPA takes both a mask and grouped heads, and the unfused one stores all scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        gqa = False
    # Torch would make this of a mask of bools, and save it for the backward pass.
    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    return attend_once(partial(scaled_dot_product_attention, scale=extras.scale, enable_gqa=gqa), q, k, v, bias)
