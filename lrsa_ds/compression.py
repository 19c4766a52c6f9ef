"""How much LRSA compresses documents: over the data, a step, or a complete run."""

from collections.abc import Iterable
from dataclasses import dataclass

from lrsa_ds.attention.partition import num_held
from lrsa_ds.labels import retention_name
from lrsa_ds.layers import AnyConfig, of_lrsa


@dataclass
class Compression:
    """Sums over documents.

    Args:
        num_tokens: tokens of all documents.
        num_held: entries of the caches at the end of the documents, for each layer and KV head.
        num_short: tokens of documents that are too short to be compressed, with at most S + 2L tokens.
    """

    num_tokens: float = 0
    num_held: float = 0
    num_short: float = 0

    @classmethod
    def of(cls, lengths: Iterable[int], config: AnyConfig) -> "Compression":
        """The sums for documents of these lengths under attention that is not dense."""
        total = cls()
        for length in lengths:
            total.num_tokens += length
            total.num_held += num_held(length, config)
            total.num_short += length if length <= config.dense_prefix_size else 0
        return total

    @property
    def factor(self) -> float:
        """How many times smaller the caches are."""
        return self.num_tokens / self.num_held


def short_documents_sentence(share: float, config: AnyConfig, of_what: str) -> str | None:
    """A sentence if some documents are too short for LRSA, else None. `of_what`: such as "the tokens trained on"."""
    if share == 0:
        return None
    percent = f"{100 * share:.1f}" if share >= 0.0005 else "less than 0.1"
    also = ": this trains like dense attention" if share == 1 else ""
    return (
        f"{percent} % of {of_what} are in documents of at most sink_size + 2 * lag_size = "
        f"{config.dense_prefix_size:,} tokens, of which LRSA compresses nothing{also}"
    )


def long_answers_sentence(lengths: tuple[int, int], config: AnyConfig) -> str | None:
    """A sentence if answers are longer than what is kept of a partition, else None.

    Args:
        lengths: the 90th percentile and the maximum of the answers' tokens (`DataReport.long_answers`).
    """
    kept = max(layer.num_kept for layer in of_lrsa(config).layers)  # it suffices if one layer keeps it
    usual, longest = lengths
    if not 0 < kept < usual:
        return None
    return (
        f"one answer in ten has {usual:,} tokens or more (the longest {longest:,}), and retention * lag_size keeps "
        f"{kept:,} of the tokens of a partition, so only a part of such an answer: raise attention.retention or "
        "attention.lag_size"
    )


def held_sentence(num_tokens: int, configs: Iterable[AnyConfig]) -> str:
    """The sizes of caches after `num_tokens` tokens of one document, with each of these settings."""
    parts = [f"after {num_tokens:,} tokens it holds"]
    for config in configs:
        held = num_held(num_tokens, config)
        share = f"{100 * held / num_tokens:.1f} %, {num_tokens / held:.2f}x smaller"
        on_average = " on average" if len(config.layers) > 1 else ""
        parts.append(f"{held:,.0f} entries{on_average} at retention {retention_name(config.retention)} ({share})")
    return f"{parts[0]} {', '.join(parts[1:])}"


def cache_lines(
    num_tokens: int, configs: Iterable[AnyConfig], share_short: float, long_answers: tuple[int, int]
) -> list[str]:
    """Lines about the caches of a training at the end of a full sequence, with warnings if the data do not suit them.

    Args:
        num_tokens: tokens of a sequence.
        configs: the attention of the steps; dense attention is left out.
        share_short, long_answers: from the report on the data.
    """
    compressed = [config for config in configs if not config.is_dense]
    if not compressed:
        return []
    warnings = [
        short_documents_sentence(share_short, compressed[0], "the tokens of the training data"),
        long_answers_sentence(long_answers, min(compressed, key=lambda config: config.share_kept)),
    ]
    lines = [f"cache: {held_sentence(num_tokens, compressed)}"]
    return lines + [f"warning: {sentence}" for sentence in warnings if sentence]
