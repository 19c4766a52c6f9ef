"""95 % intervals of shares, means and medians.

Answers about one context are not independent: a context that is hard, or whose facts the cache has dropped, is so for
all of them. So the unit of every interval is the context, never the single answer or token.
"""

import math
from collections.abc import Mapping, Sequence

Z = 1.96  # of a 95 % interval
FEWEST_CONTEXTS = 10  # from which the correlation of answers about one context is estimated


def share_interval(percent: float, count: float) -> tuple[float, float]:
    """Wilson's score interval (1927), in percent, of a share that was `percent` of `count` independent answers."""
    share = percent / 100
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def share_of_contexts(right: Sequence[float], counts: Sequence[float]) -> tuple[float, float, float]:
    """A share in percent with its interval, if answers (or tokens of answers) come in contexts.

    Wilson's interval of fewer answers: their number is divided by the design effect (Kish 1965), the variance of the
    share between contexts over that of independent answers. The effect lies between 1 (independent) and the size of a
    context (all its answers alike). It is taken to be the latter if it cannot be estimated: with fewer than
    `FEWEST_CONTEXTS` contexts, or if all answers or none are right.

    Args:
        right: of each context, the answers that are right.
        counts: of each context, all its answers; not 0.
    """
    total, contexts = sum(counts), len(counts)
    share = sum(right) / total
    most = sum(n**2 for n in counts) / total
    effect, independent = most, total * share * (1 - share)
    if contexts >= FEWEST_CONTEXTS and independent > 0:
        between = sum((r - share * n) ** 2 for r, n in zip(right, counts, strict=True)) * contexts / (contexts - 1)
        effect = min(most, max(1.0, between / independent))
    return 100 * share, *share_interval(100 * share, total / effect)


def interval_of(row: Mapping, metric: str) -> tuple[float, float]:
    """Of a share in a row of an evaluation. Rows of earlier releases have none: each of their contexts counts once."""
    if f"{metric}_low" in row:
        return row[f"{metric}_low"], row[f"{metric}_high"]
    return share_interval(row[metric], row["num_examples"])


def combined_interval(
    values: Sequence[float], intervals: Sequence[tuple[float, float]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """A weighted mean of independent estimates with its interval, from theirs (MOVER, Zou and Donner 2008)."""
    shares = [weight / sum(weights) for weight in weights]
    mean = sum(share * value for share, value in zip(shares, values, strict=True))
    below, above = (
        math.sqrt(sum((s * (v - ends[side])) ** 2 for s, v, ends in zip(shares, values, intervals, strict=True)))
        for side in (0, 1)
    )
    return mean, mean - below, mean + above


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the interval of the normal distribution; a single value has none."""
    return ratio_interval(values, [1.0] * len(values))


def ratio_interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float, float]:
    """Σ sums / Σ counts, such as nats per token, with the interval of the normal distribution.

    Args:
        sums, counts: of each context; a single one has no interval.
    """
    n, ratio = len(sums), sum(sums) / sum(counts)
    if n == 1:
        return ratio, math.nan, math.nan
    squares = sum((s - ratio * count) ** 2 for s, count in zip(sums, counts, strict=True))
    half = Z * math.sqrt(squares * n / (n - 1)) / sum(counts)
    return ratio, ratio - half, ratio + half


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Of a median: two of the sorted values, by the binomial distribution; fewer than six values have none."""
    n, outside, ways, tail = len(values), 0, 1, 0.0
    while True:  # values outside on each side, by the chance that the median is among them
        tail += ways / 2**n
        if tail > (1 - 0.95) / 2:
            break
        ways = ways * (n - outside) // (outside + 1)
        outside += 1
    ordered = sorted(values)
    return (ordered[outside - 1], ordered[n - outside]) if outside else (math.nan, math.nan)
