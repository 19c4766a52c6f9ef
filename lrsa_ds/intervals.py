"""95 % intervals of a share and of a mean."""

import math
from collections.abc import Sequence

Z = 1.96  # of a 95 % interval


def share_interval(percent: float, count: int) -> tuple[float, float]:
    """Wilson's score interval, in percent, of a share that was `percent` of `count` answers (Wilson 1927)."""
    share = percent / 100
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the interval of the normal distribution; a single value has none."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan, math.nan
    half = Z * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half
