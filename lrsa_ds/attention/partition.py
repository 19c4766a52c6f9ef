"""The partition table: which keys each query sees, as integers that do not depend on the data.

Sink, partition, lag reference, kept KV, history and window: docs/index.md. A *chunk* is a run of queries of one
document that share their history and the start of their window. The kept buffer holds, for each document that has
a history,

    [sink | kept KV of partition 0 | kept KV of partition 1 | ...]

A query at token t of a chunk sees exactly two intervals: `[hist_lo, hist_hi)` of the kept buffer and `[win_lo, t]` of
the tokens. Selection, mask, sequence parallelism and cache all use this one table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from lrsa_ds.errors import require
from lrsa_ds.layers import AnyConfig
from lrsa_ds.lrsa_config import LRSAConfig


@dataclass(frozen=True)
class Chunk:
    """Queries `[q_lo, q_hi)` that see slots `[hist_lo, hist_hi)` of the kept buffer, and tokens from `win_lo` on."""

    q_lo: int
    q_hi: int
    hist_lo: int
    hist_hi: int
    win_lo: int


@dataclass(frozen=True)
class KeptDocument:
    """A document long enough to have a history: its first token, and the first slot of its part of the kept buffer."""

    start: int
    num_partitions: int
    buffer_lo: int


@dataclass(frozen=True, eq=False)
class PartitionTable:
    """The layout of one packed sequence. Positions are tokens of the sequence, or slots of the kept buffer.

    `buffer_size` is the number of slots, including alignment gaps, which no query sees.
    """

    document_lengths: tuple[int, ...]
    config: LRSAConfig
    chunks: tuple[Chunk, ...]
    kept_documents: tuple[KeptDocument, ...]
    buffer_size: int

    @property
    def sink_size(self) -> int:
        return self.config.sink_size

    @property
    def lag_size(self) -> int:
        return self.config.lag_size

    @property
    def num_kept(self) -> int:
        return self.config.num_kept

    @property
    def num_tokens(self) -> int:
        return sum(self.document_lengths)

    @cached_property
    def num_pairs(self) -> int:
        """Number of pairs of a query and a key that it sees."""
        lengths = [(c.q_hi - c.q_lo, c) for c in self.chunks]
        return sum(n * (c.hist_hi - c.hist_lo + c.q_lo - c.win_lo) + n * (n + 1) // 2 for n, c in lengths)

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hist_lo`, `hist_hi` and `win_lo` of every query: three int32 tensors [N] on the CPU."""
        return intervals_of(self.chunks, torch.device("cpu"))


def intervals_of(chunks: Sequence[Chunk], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`hist_lo`, `hist_hi` and `win_lo` of every query of consecutive chunks: three int32 tensors [N].

    Layouts are computed per chunk and expanded to queries only here, on the device: on the CPU, operations on long
    tensors would slow each other down when several ranks share its cores.
    """
    rows = torch.tensor([(c.hist_lo, c.hist_hi, c.win_lo) for c in chunks], dtype=torch.int32).to(device)
    lengths = torch.tensor([c.q_hi - c.q_lo for c in chunks]).to(device)
    total = sum(c.q_hi - c.q_lo for c in chunks)
    hist_lo, hist_hi, win_lo = rows.repeat_interleave(lengths, dim=0, output_size=total).unbind(dim=1)
    return hist_lo, hist_hi, win_lo


def cut(chunks: Iterable[Chunk], lo: int, hi: int) -> list[Chunk]:
    """The chunks clipped to the queries `[lo, hi)`; those without a query in this range are left out."""
    inside = (c for c in chunks if c.q_lo < hi and c.q_hi > lo)
    return [replace(c, q_lo=max(c.q_lo, lo), q_hi=min(c.q_hi, hi)) for c in inside]


def num_held(num_tokens: int, config: AnyConfig) -> float:
    """Entries of a cache for each layer and KV head after `num_tokens` tokens of one document.

    The mean over the layers that have keys, if their settings differ.
    """
    return mean_of([layer.num_held(num_tokens) for layer in config.layers if layer.has_keys])


def mean_of(counts: Sequence[float]) -> float:
    """The mean; an int if it is a whole number."""
    total = sum(counts)
    return total / len(counts) if total % len(counts) else total // len(counts)


def cache_factor(lengths: Iterable[int], config: AnyConfig) -> float:
    """How many times smaller the caches of such documents are: sum of tokens seen / sum of entries held."""
    lengths = list(lengths)
    return sum(lengths) / sum(num_held(length, config) for length in lengths)


def room_in_chunk(num_tokens: int, config: AnyConfig) -> int:
    """Tokens that may follow `num_tokens` tokens before the next chunk begins in some layer."""
    return min(layer.room_in_chunk(num_tokens) for layer in config.layers)


def partition_table(document_lengths: tuple[int, ...], config: LRSAConfig, align: int = 1) -> PartitionTable:
    """The table of one packed sequence under `config`; dense causal attention per document if everything is kept.

    Args:
        document_lengths: tokens of each document, in order; each document has its own sink.
        align: the first slot of kept KV of every document is a multiple of this, so that a block-sparse kernel has few
            blocks that are seen in part.

    Raises:
        LRSAError: there is no document, or a document is empty.
    """
    require(
        len(document_lengths) > 0 and min(document_lengths) > 0,
        f"document_lengths={document_lengths} is not valid: give at least one document, each of at least one token.",
    )
    return _build(tuple(document_lengths), config, align, config.is_dense)


@lru_cache(maxsize=256)
def _build(lengths: tuple[int, ...], config: LRSAConfig, align: int, is_dense: bool) -> PartitionTable:
    sink, lag, num_kept = config.sink_size, config.lag_size, config.num_kept
    chunks, kept_documents = [], []
    token, slot = 0, 0
    for length in lengths:
        # The first S + 2L tokens see all tokens before them: sink, partition 0 and partition 1 are contiguous, so their
        # history is part of the window. Shorter documents, and all documents of dense attention, end there.
        head = length if is_dense else min(length, config.dense_prefix_size)
        chunks.append(Chunk(token, token + head, 0, 0, token))
        num_partitions = -(-(length - head) // lag)  # chunk n >= 2 adds partition n - 2 to the history
        if num_partitions:
            slot += -(slot + sink) % align
            kept_documents.append(KeptDocument(token, num_partitions, slot))
        for p in range(num_partitions):
            q_lo = token + head + p * lag
            chunks.append(
                Chunk(q_lo, min(q_lo + lag, token + length), slot, slot + sink + (p + 1) * num_kept, q_lo - lag)
            )
        if num_partitions:
            slot += sink + num_partitions * num_kept
        token += length
    return PartitionTable(lengths, config, tuple(chunks), tuple(kept_documents), slot)
