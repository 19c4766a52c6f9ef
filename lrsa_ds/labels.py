"""Names of caches in tables and figures: by retention, and by how many times smaller they were measured to be.

A retention of 1/8 does not make a cache eight times smaller: sink, window and the newest tokens are kept in full. So
the retention only names a cache, and the factor next to it is measured.
"""

from collections.abc import Iterable
from fractions import Fraction

# For the legends of tables and figures.
SMALLER = "tokens seen / entries held"


def retention_name(retention: float) -> str:
    """Such as "1/8" or "0.3"; "dense" for the cache that keeps everything."""
    share = Fraction(retention).limit_denominator(1024)
    return "dense" if retention == 1 else f"1/{share.denominator}" if share.numerator == 1 else f"{retention:.3g}"


def factor_name(factors: Iterable[float | None]) -> str:
    """Such as "4.27x", or "3.90–4.27x" if the factors differ; "-" if none is known."""
    known = [factor for factor in factors if factor is not None]
    if not known:
        return "-"
    ends = dict.fromkeys(f"{end:.2f}" if end < 10 else f"{end:.1f}" for end in (min(known), max(known)))
    return "–".join(ends) + "x"


def cache_of(row: dict) -> str:
    """The name of the cache of a row; rows of earlier releases have only the retention."""
    return row.get("cache") or retention_name(row["retention"])


def caches_in_order(rows: list[dict]) -> list[str]:
    """The names of all caches, from the largest to the smallest."""
    mine: dict[str, list[dict]] = {}
    for row in rows:
        mine.setdefault(cache_of(row), []).append(row)
    return sorted(mine, key=lambda name: _smallness(mine[name]))


def rows_of_smallest(rows: list[dict]) -> list[dict]:
    """The rows of the smallest cache."""
    smallest = caches_in_order(rows)[-1]
    return [row for row in rows if cache_of(row) == smallest]


def _smallness(rows: list[dict]) -> tuple[float, float]:
    factors = [row.get("cache_factor") or 1.0 for row in rows]
    return sum(factors) / len(factors), -rows[0]["retention"]


def is_dense_cache(row: dict) -> bool:
    return row["retention"] == 1


def cache_tick(rows: list[dict], cache: str) -> str:
    """A label for an axis: the name of a cache, and below it how many times smaller it was in these rows."""
    mine = [row for row in rows if cache_of(row) == cache]
    factors = factor_name(row.get("cache_factor") for row in mine)
    name = cache.replace(" + ", " +\n")
    return name if all(is_dense_cache(row) for row in mine) else f"{name}\n({factors})"
