"""Dense attention of one sequence over several ranks: DeepSpeed's Ulysses, with packed documents kept apart."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.nn.functional import pad

from lrsa_ds.attention import lrsa_attention
from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.errors import require
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.all_to_all import SequenceGroup
from lrsa_ds.parallel.sequence.head_groups import check_heads
from lrsa_ds.parallel.sequence.strategy import Sharing


def check_dense_heads(num_kv_heads: int, size: int) -> None:
    """Raises LRSAError unless Ulysses can distribute the KV heads: one number must divide the other."""
    require(
        num_kv_heads % size == 0 or size % num_kv_heads == 0,
        f"parallel.sp_size={size} under dense attention needs a number that divides the {num_kv_heads} KV heads of the "
        "model, or is a multiple of them; LRSA alone has no such limit: leave 1.0 out of attention.retention and "
        "eval.retentions, and do without objective=distill, whose teacher is dense.",
    )


def check_dense(sharing: Sharing) -> None:
    """Raises LRSAError for a `Sharing` that dense attention does not support."""
    check_heads(sharing.num_heads, sharing.size)
    check_dense_heads(sharing.num_kv_heads, sharing.size)


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    group: SequenceGroup,
    extras: Extras = PLAIN,
    layer: int = 0,
) -> torch.Tensor:
    """Dense causal attention of the whole sequence, for the queries of this rank's shard.

    Args:
        q: [1, H, n, D], of this rank's shard; k, v: [1, G, n, D], of v perhaps another D.
        config: with a retention of 1.
        document_lengths: of the whole sequence, summing to P * n.
        layer: not used.

    Returns:
        [1, H, n, D].
    """
    order = group.strategy.token_order(group.size * q.shape[2], group.size, q.device)
    # DeepSpeed takes one head dim. Zeros behind the smaller ones change neither scores nor what is cut off again.
    extras, value_dim = replace(extras, scale=extras.scale_of(q.shape[3])), v.shape[3]
    dim = max(q.shape[3], value_dim)
    q, k, v = (pad(x, (0, dim - x.shape[3])) for x in (q, k, v))
    ulysses = _ulysses(q.shape[1], k.shape[1], dim, group)
    own = q.shape[1] // group.size
    # DeepSpeed gathers positions for kernels that find documents by them; ours receive the lengths.
    positions = torch.zeros(1, q.shape[2], dtype=torch.int64, device=q.device)
    output, _ = ulysses(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        position_ids=positions,
        lrsa_config=config,
        document_lengths=document_lengths,
        extras=extras.of_heads(slice(group.index * own, (group.index + 1) * own)),
        order=order,
    )
    return output.view(1, q.shape[2], q.shape[1], dim)[..., :value_dim].transpose(1, 2)


@lru_cache(maxsize=16)
def _ulysses(num_heads: int, num_kv_heads: int, head_dim: int, group: SequenceGroup) -> UlyssesSPAttentionHF:
    return UlyssesSPAttentionHF(
        attn=_dense_core,
        batch_size=1,
        attn_head_count=num_heads,
        attn_head_size=head_dim,
        kv_head_count=num_kv_heads,
        num_hidden_layers=1,
        process_group=cast(Any, group.process_group),  # it is annotated as a class of that name in DeepSpeed
        seq_length_is_variable=True,
    )


def _dense_core(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    lrsa_config: LRSAConfig,
    document_lengths: tuple[int, ...],
    extras: Extras,
    order: tuple[torch.Tensor, torch.Tensor] | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What Ulysses calls on the head group with all tokens, rank after rank: [1, H / P, N, D] to [1, N, H / P, D]."""
    if order is None:
        output = lrsa_attention(query, key, value, lrsa_config, document_lengths, extras=extras)
        return output.transpose(1, 2).contiguous(), None
    in_ranks, of_token = order
    query, key, value = (x.index_select(2, of_token) for x in (query, key, value))
    output = lrsa_attention(query, key, value, lrsa_config, document_lengths, extras=extras)
    return output.transpose(1, 2).index_select(1, in_ranks), None
