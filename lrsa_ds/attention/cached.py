"""LRSA attention of new tokens after a compressed cache: the same function as one pass over the complete sequence."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn.functional import pad

from lrsa_ds.attention.chunked import attend_causally, attend_chunks
from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.joining import join
from lrsa_ds.attention.kept_buffer import gather_kept
from lrsa_ds.attention.kernels.blocks import BLOCK, LEAST_TOKENS_AHEAD, power_of_two
from lrsa_ds.attention.kernels.interval import Ahead, Intervals
from lrsa_ds.attention.kernels.kernel import Kernel, choose_kernel
from lrsa_ds.attention.kinds.kind import KeysAndValues
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
    held: KeysAndValues | None = None,
) -> torch.Tensor:
    """Attention of n new tokens of a document after `num_seen` earlier tokens.

    Args:
        q: queries of the new tokens, [B, H, n, D].
        k, v: [B, G, c + n, D]: the entries of `LagKVCache`, [sink | kept KV of the compressed partitions | all tokens
            since], and then the new tokens.
        held: the entries once the new tokens are compressed, if the caller has them: then nothing is selected again.

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
            return cached_attention_on(kernel, q, k, v, num_seen, config, extras, layer, held)
    if num_new <= config.room_in_chunk(num_seen):
        return attend_causally(q, k, v, extras)
    chunks, missing = _chunks(num_seen, num_new, config)
    kept_k, kept_v = _kept(k, v, num_seen, num_new, config, layer, held)
    return attend_chunks(q, k, v, kept_k, kept_v, chunks, extras, first_query=num_seen, first_key=missing)


def cached_attention_of_last(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LRSAConfig,
    extras: Extras = PLAIN,
    layer: int = 0,
    held: KeysAndValues | None = None,
) -> torch.Tensor:
    """`cached_attention` of the last new token: [B, H, 1, D]."""
    q, k, v = in_one_dtype(q, k, v)
    chunks, missing = _chunks(num_seen, q.shape[2], config)
    kept = _kept(k, v, num_seen, q.shape[2], config, layer, held)
    last = replace(chunks[-1], q_lo=chunks[-1].q_hi - 1)
    return attend_chunks(q, k, v, *kept, [last], extras, first_query=num_seen, first_key=missing)


def cached_attention_on(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LRSAConfig,
    extras: Extras = PLAIN,
    layer: int = 0,
    held: KeysAndValues | None = None,
) -> torch.Tensor:
    """`cached_attention` in one call of a kernel over [kept buffer | window and new tokens]."""
    num_new = q.shape[2]
    kept = _kept(k, v, num_seen, num_new, config, layer, held)
    layout = _layout(num_seen, num_new, config, q.device, kernel.compiles_shapes, kernel.skips_queries_ahead)
    keys, values = (layout.arranged(*pair) for pair in zip(kept, (k, v), strict=True))
    queries = pad(q, (0, 0, 0, layout.num_queries - num_new)) if layout.num_queries > num_new else q
    return extras.with_sinks(*kernel.attend(queries, keys, values, layout.intervals, extras))[0][:, :, :num_new]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Keys as a kernel reads them, [lead | kept buffer | gap | tokens from `first_key` on | tail], and what it sees.

    Lead and gap let kept KV and partitions begin with a block, as far as their sizes allow; no query sees them.

    Args:
        intervals: of the queries; those behind the new tokens, which are padding, see nothing.
        num_kept: slots of the kept buffer.
        first_key: the first entry of the given keys that is in the window of a query.
        num_queries: the new tokens, and padding.
    """

    intervals: Intervals
    lead: int
    num_kept: int
    gap: int
    first_key: int
    tail: int
    num_queries: int

    def arranged(self, kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The kept buffer [B, G, R, D] and keys or values [B, G, c + n, D] in this order."""
        # What fills lead and gap is arbitrary, but finite: a kernel multiplies it by 0.
        parts = [x[:, :, : self.lead], kept, x[:, :, : self.gap], x[:, :, self.first_key :]]
        if self.tail:
            parts.append(x.new_zeros(*x.shape[:2], self.tail, x.shape[3]))
        return join(parts)


@lru_cache(maxsize=64)
def _layout(
    num_seen: int, num_new: int, config: LRSAConfig, device: torch.device, pads: bool, skips_ahead: bool
) -> _Layout:
    """The layout of a pass.

    Args:
        pads: whether queries and keys are padded to powers of two, so that few shapes are compiled for prompts of all
            lengths.
        skips_ahead: whether the kernel takes `Intervals.ahead`.
    """
    chunks, missing = _chunks(num_seen, num_new, config)
    num_kept, first = _num_kept(num_seen, num_new, config), chunks[0].win_lo
    is_in_blocks = config.lag_size % BLOCK == 0 and num_kept > 0
    lead = -config.sink_size % BLOCK if is_in_blocks else 0
    gap = (first - config.sink_size - lead - num_kept) % BLOCK if is_in_blocks else 0
    start = lead + num_kept + gap
    total = start + num_seen + num_new - first
    num_queries, num_keys = (power_of_two(count) if pads else count for count in (num_new, total))
    hist_lo, hist_hi, win_lo = intervals_of(chunks, device)
    shift = start - first
    own = torch.arange(num_seen, num_seen + num_new, dtype=torch.int32, device=device)
    # An empty history stays empty: both its ends are moved.
    ends = (hist_lo + lead, hist_hi + lead, win_lo + shift, own + 1 + shift)
    lo, hi, also_lo, also_hi = (pad(x, (0, num_queries - num_new)) for x in ends)
    ahead = 0
    if skips_ahead and is_in_blocks and num_seen == 0 and num_new >= LEAST_TOKENS_AHEAD:
        ahead = config.sink_size % BLOCK
    intervals = Intervals(lo, hi, Intervals(also_lo, also_hi), Ahead(ahead, start))
    return _Layout(intervals, lead, num_kept, gap, first - missing, num_keys - total, num_queries)


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
    partitions = _partitions(first, after - before, config.lag_size, keys.device, before)
    kept = fast_select_partitions(keys, values, partitions, config, layer)
    since = first + (after - before) * config.lag_size
    keys, values = (join([x[:, :, :first], gather_kept(x, kept.flatten(2)), x[:, :, since:]]) for x in (keys, values))
    return keys, values


def _chunks(num_seen: int, num_new: int, config: LRSAConfig) -> tuple[list[Chunk], int]:
    """The chunks of the new tokens, and how many tokens are missing from the keys.

    Token t is at place t - missing of the keys, unless it is in a compressed partition.
    """
    chunks = cut(partition_table((num_seen + num_new,), config).chunks, num_seen, num_seen + num_new)
    return chunks, config.num_compressed(num_seen) * (config.lag_size - config.num_kept)


@lru_cache(maxsize=64)
def _partitions(first: int, count: int, lag: int, device: torch.device, number: int) -> Partitions:
    """`Partitions.adjacent`, made once for all layers."""
    return Partitions.adjacent(first, count, lag, device, number)


def _kept(
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    num_new: int,
    config: LRSAConfig,
    layer: int,
    held: KeysAndValues | None,
) -> KeysAndValues:
    """The kept buffer that the new tokens see: two [B, G, R, D]; empty if none of the tokens has a history."""
    size = _num_kept(num_seen, num_new, config)
    if held is not None or not size:  # a cache begins with the kept buffer
        held_k, held_v = held or (k, v)
        return held_k[:, :, :size], held_v[:, :, :size]
    num_compressed = config.num_compressed(num_seen)
    before = config.sink_size + num_compressed * config.num_kept
    # Within one chunk, all partitions of the history are compressed already.
    count = max(0, _num_partitions(num_seen, num_new, config) - num_compressed)
    partitions = _partitions(before, count, config.lag_size, k.device, num_compressed)
    kept = fast_select_partitions(k, v, partitions, config, layer).flatten(2)
    kept_k, kept_v = (join([x[:, :, :before], gather_kept(x, kept)])[:, :, :size] for x in (k, v))
    return kept_k, kept_v


def _num_partitions(num_seen: int, num_new: int, config: LRSAConfig) -> int:
    """Partitions whose kept KV a new token sees."""
    documents = partition_table((num_seen + num_new,), config).kept_documents
    return documents[0].num_partitions if documents else 0


def _num_kept(num_seen: int, num_new: int, config: LRSAConfig) -> int:
    """Slots of the kept buffer that the new tokens see."""
    count = _num_partitions(num_seen, num_new, config)
    return config.sink_size + count * config.num_kept if count else 0
