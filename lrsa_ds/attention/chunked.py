"""LRSA attention as a plain loop over chunks: the readable definition, and the oracle of every faster backend."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from lrsa_ds.attention.select import buffer_positions, gather_kept
from lrsa_ds.partition import Chunk, PartitionTable


def chunked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: PartitionTable, scale: float | None = None
) -> torch.Tensor:
    """Attention of q [B, H, N, D] over k, v [B, G, N, D] under `table`: [B, H, N, D]. H is a multiple of G."""
    positions = buffer_positions(k, v, table)
    kept_k, kept_v = gather_kept(k, positions), gather_kept(v, positions)
    outputs = []
    for chunk in table.chunks:
        history, window = slice(chunk.hist_lo, chunk.hist_hi), slice(chunk.win_lo, chunk.q_hi)
        keys = torch.cat([kept_k[:, :, history], k[:, :, window]], dim=2)
        values = torch.cat([kept_v[:, :, history], v[:, :, window]], dim=2)
        queries = q[:, :, chunk.q_lo : chunk.q_hi]
        # With as many keys as queries plain causality says it all, and SDPA's fastest kernels know that case.
        square = keys.shape[2] == queries.shape[2]
        outputs.append(
            scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=None if square else _chunk_mask(chunk, q.device),
                is_causal=square,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def _chunk_mask(chunk: Chunk, device: torch.device) -> torch.Tensor:
    """Who sees whom in a chunk, bool [queries, history + window]: all of the history, and the window up to oneself."""
    num_history = chunk.hist_hi - chunk.hist_lo
    window = torch.arange(chunk.win_lo, chunk.q_hi, device=device)
    queries = torch.arange(chunk.q_lo, chunk.q_hi, device=device)
    history_mask = torch.ones(len(queries), num_history, dtype=torch.bool, device=device)
    return torch.cat([history_mask, window <= queries[:, None]], dim=1)
