"""LRSA attention of new tokens after a compressed cache: the same function as one pass over the complete sequence."""

from functools import lru_cache

import torch
from torch.nn.functional import pad

from lrsa_ds.attention.chunked import attend_causally, attend_chunks
from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kept_buffer import gather_kept
from lrsa_ds.attention.kernels.blocks import BLOCK, power_of_two
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.kernels.kernel import Kernel, choose_kernel
from lrsa_ds.attention.lrsa import in_one_dtype
from lrsa_ds.attention.partition import (
    Chunk,
    cut,
    intervals_of,
    partition_table,
)
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import fast_select_partitions
from lrsa_ds.lrsa_config import LRSAConfig


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LRSAConfig,
    extras: Extras = PLAIN,
    layer: int = 0,
) -> torch.Tensor:
    """Attention of n new tokens of a document after `num_seen` earlier tokens.

    Args:
        q: queries of the new tokens, [B, H, n, D].
        k, v: [B, G, c + n, D]: the entries of `LagKVCache`, [sink | kept KV of the compressed partitions | all tokens
            since], and then the new tokens.

    Returns:
        [B, H, n, D]. If the new tokens span several chunks, each chunk sees the same keys as in a pass of its own.
    """
    q, k, v = in_one_dtype(q, k, v)
    num_new = q.shape[2]
    if num_new >= BLOCK:
        kernel = choose_kernel(config, q.device, q.dtype, q.shape[3], value_dim=v.shape[3], extras=extras)
        # As many keys as queries: plain causal attention, for which SDPA has dense kernels.
        is_causal = extras.is_plain and num_seen == 0 and num_new <= config.room_in_chunk(0)
        if not kernel.is_readable and not is_causal:
            return cached_attention_on(kernel, q, k, v, num_seen, config, extras, layer)
    if num_new <= config.room_in_chunk(num_seen):
        return attend_causally(q, k, v, extras)
    chunks, missing = _chunks(num_seen, num_new, config)
    kept_k, kept_v = _kept(k, v, num_seen, num_new, config, layer)
    return attend_chunks(q, k, v, kept_k, kept_v, chunks, extras, first_query=num_seen, first_key=missing)


def cached_attention_on(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LRSAConfig,
    extras: Extras = PLAIN,
    layer: int = 0,
) -> torch.Tensor:
    """`cached_attention` in one call of a kernel over [kept buffer | `k` and `v`].

    Queries and keys are padded to powers of two, so that few shapes are compiled for prompts of all lengths; no query
    sees the padding.
    """
    num_new = q.shape[2]
    kept_k, kept_v = _kept(k, v, num_seen, num_new, config, layer)
    num_queries, num_keys = power_of_two(num_new), power_of_two(kept_k.shape[2] + k.shape[2])
    intervals = _intervals(num_seen, num_new, config, kept_k.shape[2], num_queries, q.device)
    tail = (0, 0, 0, num_keys - kept_k.shape[2] - k.shape[2])
    keys, values = (pad(torch.cat(pair, dim=2), tail) for pair in ((kept_k, k), (kept_v, v)))
    queries = pad(q, (0, 0, 0, num_queries - num_new))
    return extras.with_sinks(*kernel.attend(queries, keys, values, intervals, extras))[0][:, :, :num_new]


@torch.no_grad()
def compress(
    keys: torch.Tensor, values: torch.Tensor, seen_before: int, seen: int, config: LRSAConfig, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of keys and values [B, G, length, D] once `seen` tokens were seen.

    They are compressed as they were at `seen_before`.
    """
    before, after = config.num_compressed(seen_before), config.num_compressed(seen)
    if before == after:
        return keys, values
    first = config.sink_size + before * config.num_kept
    partitions = Partitions.adjacent(first, after - before, config.lag_size, keys.device, number=before)
    kept = fast_select_partitions(keys, values, partitions, config, layer)
    since = first + (after - before) * config.lag_size
    keys, values = (
        torch.cat([x[:, :, :first], gather_kept(x, kept.flatten(2)), x[:, :, since:]], dim=2) for x in (keys, values)
    )
    return keys, values


def _chunks(num_seen: int, num_new: int, config: LRSAConfig) -> tuple[list[Chunk], int]:
    """The chunks of the new tokens, and how many tokens are missing from the keys.

    Token t is at place t - missing of the keys, unless it is in a compressed partition.
    """
    chunks = cut(partition_table((num_seen + num_new,), config).chunks, num_seen, num_seen + num_new)
    return chunks, config.num_compressed(num_seen) * (config.lag_size - config.num_kept)


def _kept(
    k: torch.Tensor, v: torch.Tensor, num_seen: int, num_new: int, config: LRSAConfig, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept buffer that the new tokens see: two [B, G, R, D]; empty if none of the tokens has a history."""
    documents = partition_table((num_seen + num_new,), config).kept_documents
    if not documents:
        return k[:, :, :0], v[:, :, :0]
    num_compressed = config.num_compressed(num_seen)
    before = config.sink_size + num_compressed * config.num_kept
    # Within one chunk, all partitions of the history are compressed already.
    count = max(0, documents[0].num_partitions - num_compressed)
    partitions = Partitions.adjacent(before, count, config.lag_size, k.device, number=num_compressed)
    kept = fast_select_partitions(k, v, partitions, config, layer).flatten(2)
    kept_k, kept_v = (torch.cat([x[:, :, :before], gather_kept(x, kept)], dim=2) for x in (k, v))
    return kept_k, kept_v


@lru_cache(maxsize=64)
def _intervals(
    num_seen: int, num_new: int, config: LRSAConfig, num_kept: int, num_queries: int, device: torch.device
) -> Intervals:
    """What the new tokens see of [kept buffer | keys]; the queries after them, which are padding, see nothing."""
    chunks, missing = _chunks(num_seen, num_new, config)
    hist_lo, hist_hi, win_lo = intervals_of(chunks, device)
    shift = num_kept - missing
    own = torch.arange(num_seen, num_seen + num_new, dtype=torch.int32, device=device)
    ends = (hist_lo, hist_hi, win_lo + shift, own + 1 + shift)
    lo, hi, also_lo, also_hi = (pad(x, (0, num_queries - num_new)) for x in ends)
    return Intervals(lo, hi, Intervals(also_lo, also_hi))
