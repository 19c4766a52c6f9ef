"""Layers in which each token sees a run of tokens that ends with itself: one interval for each query.

A kind of this sort says where the run begins; mask, cache and halo follow from that. Documents are kept apart.

Shapes: B rows, H query heads, G KV heads, N tokens, n new tokens, D head dim.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad

from lrsa_ds.attention.chunked import attend_causally, attend_masked
from lrsa_ds.attention.extras import PLAIN, Extras, extras_of
from lrsa_ds.attention.kernels.blocks import BLOCK, power_of_two
from lrsa_ds.attention.kernels.interval import Intervals, sees
from lrsa_ds.attention.kernels.kernel import Kernel, choose_kernel
from lrsa_ds.attention.kinds.kind import Halo, KeysAndValues, LayerKind
from lrsa_ds.attention.lrsa import check_shapes, in_one_dtype
from lrsa_ds.layer_settings import UNLIMITED, OtherSettings

# Queries that the readable form attends at once, at least.
QUERIES_AT_ONCE = 512


class LocalSettings(OtherSettings):
    """The settings of such a layer."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """The most tokens before itself that a token sees."""

    @abstractmethod
    def first_seen(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first token that each token sees: from places in a document, int64, to places in it."""

    def num_held(self, num_tokens: int) -> int:
        """What the next token sees."""
        return num_tokens - int(self.first_seen(torch.tensor(num_tokens)))

    def most_held(self, max_tokens: int) -> int:
        return min(max_tokens, self.reach + 1)

    def room_in_chunk(self, num_tokens: int) -> int:
        return UNLIMITED


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LocalSettings,
    document_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    layer: int = 0,
    extras: Extras | None = None,
) -> torch.Tensor:
    """Attention of a whole sequence, as `lrsa_attention`: q [B, H, N, D], k and v [B, G, N, D] to [B, H, N, D]."""
    lengths = check_shapes(q, k, v, document_lengths)
    extras = extras_of(scale, extras)
    q, k, v = in_one_dtype(q, k, v)
    is_local = max(lengths) > config.reach + 1
    kernel = choose_kernel(config, q.device, q.dtype, q.shape[3], is_local, value_dim=v.shape[3], extras=extras)
    if not kernel.is_readable:
        intervals = document_intervals(lengths, config, q.device)
        return extras.with_sinks(*kernel(q, k, v, intervals, extras))[0]
    documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_attend_document(q, k, v, config, 0, extras) for q, k, v in documents], dim=2)


def cached_local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LocalSettings,
    extras: Extras = PLAIN,
    layer: int = 0,
    held: KeysAndValues | None = None,
) -> torch.Tensor:
    """Attention of n new tokens of a document of which `num_seen` tokens were seen before.

    Args:
        q: [B, H, n, D].
        k, v: [B, G, c + n, D], of the c tokens that the first new one sees before itself, and of the new ones.
        held: not used.

    Returns:
        [B, H, n, D].
    """
    q, k, v = in_one_dtype(q, k, v)
    if q.shape[2] >= BLOCK:
        kernel = choose_kernel(config, q.device, q.dtype, q.shape[3], value_dim=v.shape[3], extras=extras)
        if not kernel.is_readable:
            return cached_local_attention_on(kernel, q, k, v, num_seen, config, extras)
    return _attend_document(q, k, v, config, num_seen + q.shape[2] - k.shape[2], extras)


def last_local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LocalSettings,
    extras: Extras = PLAIN,
    layer: int = 0,
    held: KeysAndValues | None = None,
) -> torch.Tensor:
    """`cached_local_attention` of the last new token: [B, H, 1, D]. To it, the others are tokens seen before."""
    return cached_local_attention(q[:, :, -1:], k, v, num_seen + q.shape[2] - 1, config, extras)


def compress_local(
    keys: torch.Tensor, values: torch.Tensor, seen_before: int, seen: int, config: LocalSettings, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache holds: the tokens that the next one sees."""
    dropped = keys.shape[2] - config.num_held(seen)
    if not dropped:
        return keys, values
    # A copy: a view would hold the memory of all tokens.
    return keys[:, :, dropped:].clone(), values[:, :, dropped:].clone()


@lru_cache(maxsize=256)
def local_pairs(document_lengths: tuple[int, ...], config: LocalSettings) -> int:
    """Pairs of a query and a key that it sees."""
    places, _ = _places(document_lengths, torch.device("cpu"))
    return int((places - config.first_seen(places) + 1).sum())


def local_kind(layer_type: str, read: Callable[[Any], LocalSettings]) -> LayerKind:
    """A kind of this sort; `layer_type` and `read` as in `LayerKind`."""
    return LayerKind(
        attend=local_attention,
        attend_cached=cached_local_attention,
        attend_last=last_local_attention,
        compress=compress_local,
        num_pairs=local_pairs,
        layer_type=layer_type,
        read=read,
        halo=Halo(size=lambda config: config.reach, intervals=document_intervals),
    )


@lru_cache(maxsize=64)
def document_intervals(document_lengths: tuple[int, ...], config: LocalSettings, device: torch.device) -> Intervals:
    """What each token of packed documents sees of the tokens."""
    places, starts = _places(document_lengths, device)
    return Intervals((starts + config.first_seen(places)).int(), (starts + places + 1).int())


def _places(document_lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each token in its document, and the first token of that: int64 [N]."""
    lengths, total = torch.tensor(document_lengths, device=device), sum(document_lengths)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=total)
    return torch.arange(total, device=device) - starts, starts


def _attend_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LocalSettings, first_key: int, extras: Extras
) -> torch.Tensor:
    """The readable form: the last tokens of a document, [B, H, n, D], over k and v, which begin with `first_key`."""
    end = first_key + k.shape[2]
    places = torch.arange(end - q.shape[2], end, device=q.device)
    if int(config.first_seen(places[-1])) <= first_key:
        return attend_causally(q, k, v, extras)
    at_once, outputs = max(QUERIES_AT_ONCE, config.reach), []
    for part, queries in zip(places.split(at_once), q.split(at_once, dim=2), strict=True):
        lo, hi = config.first_seen(part) - first_key, part + 1 - first_key
        keys = slice(int(lo[0]), int(hi[-1]))
        visible = sees(lo, hi, keys.start, keys.stop)
        outputs.append(attend_masked(queries, k[:, :, keys], v[:, :, keys], visible, extras))
    return torch.cat(outputs, dim=2)


def cached_local_attention_on(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LocalSettings,
    extras: Extras = PLAIN,
) -> torch.Tensor:
    """`cached_local_attention` on a kernel, padded to powers of two where each shape has to be compiled."""
    num_new, num_keys = q.shape[2], k.shape[2]
    if kernel.compiles_shapes:
        q, k, v = (pad(x, (0, 0, 0, power_of_two(x.shape[2]) - x.shape[2])) for x in (q, k, v))
    first_key = num_seen + num_new - num_keys
    intervals = _last_intervals(config, first_key, num_keys, num_new, q.shape[2], q.device)
    return extras.with_sinks(*kernel.attend(q, k, v, intervals, extras))[0][:, :, :num_new]


@lru_cache(maxsize=64)
def _last_intervals(
    config: LocalSettings, first_key: int, num_keys: int, num_new: int, num_queries: int, device: torch.device
) -> Intervals:
    """What the last `num_new` of the keys see of them; the queries behind them see nothing."""
    keys = torch.arange(num_keys - num_new, num_keys, device=device)
    ends = (config.first_seen(keys + first_key) - first_key, keys + 1)
    lo, hi = (pad(x.int(), (0, num_queries - num_new)) for x in ends)
    return Intervals(lo, hi)
