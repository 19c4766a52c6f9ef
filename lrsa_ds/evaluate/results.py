"""The results of an evaluation on disk, which allow it to resume, and their means with intervals."""

import json
import os
from collections import defaultdict
from pathlib import Path

from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import OLD_SPELLINGS, PREFILLS
from lrsa_ds.intervals import mean_interval, share_interval
from lrsa_ds.labels import retention_name

RESULTS = "results.jsonl"
PARTS = "results.rank*.jsonl"
KEY = ("task", "length", "index", "prefill", "retention", "layers")
NUM_SHOWN = 3  # samples of each task, length and cache whose answers W&B shows


def part_of(directory: Path, rank: int) -> Path:
    """The file in which a rank records its results: ranks never write to the same file."""
    return directory / PARTS.replace("*", str(rank))


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def collect(directory: Path) -> list[dict]:
    """All rows in `results.jsonl` and its parts, each once. Only one rank may call it, while no rank is writing.

    Raises:
        LRSAError: a line is broken, and it is not the last line of a stopped run.
    """
    rows: dict[tuple, dict] = {}
    parts = sorted(directory.glob(PARTS))
    for path in [directory / RESULTS, *parts]:
        if path.exists():
            rows |= {key_of(row): row for row in _read(path)}
    merged = sorted(rows.values(), key=key_of)
    partial = directory / f"{RESULTS}.partial"
    try:
        partial.write_text("".join(json.dumps(row) + "\n" for row in merged), encoding="utf-8")
        os.replace(partial, directory / RESULTS)
    except OSError as error:
        raise LRSAError(f"{directory / RESULTS} cannot be written: {error.strerror}.") from error
    for path in parts:
        path.unlink()
    return merged


def read_results(directory: Path) -> list[dict]:
    return _read(directory / RESULTS)


def _read(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                row = json.loads(line)
                prefill = OLD_SPELLINGS.get(row["prefill"], row["prefill"])
                rows.append({"layers": ""} | row | {"prefill": prefill})
        except json.JSONDecodeError as error:
            if number == len(lines):  # without a newline: the run was stopped while writing
                break
            raise LRSAError(f"{path}, line {number} is broken: remove it, and its sample is repeated.") from error
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """One row for each task, length, cache and metric, in the order of the rows.

    `mean` with its 95 % interval `low` to `high`; `num_samples`; `cache_factor`; `cache_bytes`, the mean;
    `tokens_per_s` of decoding, None if nothing was generated. Scores in percent have Wilson's interval, which is exact
    for shares and wide for scores between 0 and 100; `nll` has the interval of the normal distribution.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        for metric in row["scores"]:
            groups[row["task"], row["length"], row["prefill"], row["retention"], row["layers"], metric].append(row)
    found = []
    for (task, length, prefill, retention, layers, metric), mine in groups.items():
        scores = [row["scores"][metric] for row in mine]
        mean, low, high = mean_interval(scores) if metric == "nll" else wilson(scores)
        row = {"task": task, "length": length, "prefill": prefill, "retention": retention, "layers": layers}
        row |= {"cache": cache_name(prefill, retention, layers), "metric": metric, "num_samples": len(scores)}
        row |= {"cache_factor": measured_factor(mine), "cache_bytes": _ratio(mine, "cache_bytes")}
        row["tokens_per_s"] = _ratio(mine, "num_said", "seconds")
        found.append(row | {"mean": mean, "low": low, "high": high})
    return found


def shown_predictions(rows: list[dict]) -> list[dict]:
    """The outputs for the first samples of each task, length and cache, with the right answers."""
    names = ("task", "length", "index", "prefill", "retention", "layers", "answers", "prediction")
    first = [row for row in rows if row["index"] < NUM_SHOWN and "prediction" in row]
    return [{name: row[name] for name in names} | row["scores"] for row in first]


def measured_factor(rows: list[dict]) -> float | None:
    """Tokens seen / entries held, over the caches of these samples; None for rows without them."""
    if any("num_held" not in row for row in rows):
        return None
    return sum(row["num_tokens"] for row in rows) / sum(row["num_held"] for row in rows)


def _ratio(rows: list[dict], name: str, over: str | None = None) -> float | None:
    """Sum of one column / sum of another, or the mean; None for rows without them."""
    if any(key not in row for row in rows for key in (name, over or name)):
        return None
    return sum(row[name] for row in rows) / (sum(row[over] for row in rows) if over else len(rows))


def wilson(scores: list[float]) -> tuple[float, float, float]:
    """Mean and Wilson's score interval of scores from 0 to 100."""
    mean = sum(scores) / len(scores)
    return mean, *share_interval(mean, len(scores))


def cache_name(prefill: str, retention: float, layers: str = "") -> str:
    """Such as "dense", "chunked 1/8" or "chunked 6 dense + 24 window"."""
    share = "1" if retention == 1 else retention_name(retention)
    return prefill if prefill == "dense" else f"{prefill} {layers or share}"


def caches_of(rows: list[dict]) -> list[tuple[str, float, str]]:
    """Prefill, retention and layers of all caches of these rows, in display order."""
    caches = {(row["prefill"], row["retention"], row["layers"]) for row in rows}
    return sorted(caches, key=lambda cache: (PREFILLS.index(cache[0]), -cache[1], cache[2]))
