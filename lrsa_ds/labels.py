"""How caches are named in tables and pictures: by the retention, and by how many times smaller they really were.

A retention of 1/8 does not make a cache eight times smaller: sink, window and the tokens since are held in full. So the
retention only names a cache, and the factor that stands beside it is measured.
"""

from collections.abc import Iterable
from fractions import Fraction

# For the legends of tables and pictures.
SMALLER = "tokens seen / entries held"


def retention_name(retention: float) -> str:
    """Such as "1/8" or "0.3"; "dense" for the cache that holds everything."""
    share = Fraction(retention).limit_denominator(1024)
    return "dense" if retention == 1 else f"1/{share.denominator}" if share.numerator == 1 else f"{retention:.3g}"


def factor_name(factors: Iterable[float | None]) -> str:
    """Such as "4.27x", or "3.90–4.27x" where the factors differ; "-" where none is known."""
    known = [factor for factor in factors if factor is not None]
    if not known:
        return "-"
    ends = dict.fromkeys(f"{end:.2f}" if end < 10 else f"{end:.1f}" for end in (min(known), max(known)))
    return "–".join(ends) + "x"


def cache_tick(rows: list[dict], retention: float) -> str:
    """For an axis: the name of a cache, and below it how many times smaller it was in these rows."""
    factors = (row.get("cache_factor") for row in rows if row["retention"] == retention)
    return retention_name(retention) + ("" if retention == 1 else f"\n({factor_name(factors)})")
