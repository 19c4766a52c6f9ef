"""Figures of finished runs side by side: `python benchmarks/table.py DIRECTORY ...`, each with a metrics.jsonl."""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrsa_ds.labels import cache_of, caches_in_order, factor_name


def rows_of(directory: Path, kind: str) -> list[dict]:
    path = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["kind"] == kind]


def step_line(directory: Path) -> str | None:
    """Median of the steps after the first two, which compile."""
    steps = rows_of(directory, "train")[2:]
    if not steps:
        return None
    seconds = statistics.median(row["step_seconds"] for row in steps)
    tokens = statistics.median(row["tokens_per_second"] for row in steps)
    line = f"{directory.name:<28}{seconds:>9.2f} s/step{tokens:>11,.0f} tokens/s{steps[-1]['peak_memory_gb']:>8.1f} GB"
    if "sent_bytes_forward" in steps[-1]:
        row = steps[-1]
        sent, ulysses = (row[f"{name}_forward"] + row[f"{name}_backward"] for name in ("sent_bytes", "ulysses_bytes"))
        kept = (
            row["sent_bytes_forward_kept"] / row["ulysses_bytes_forward_kv"] if row["ulysses_bytes_forward_kv"] else 0
        )
        line += f"  sent {sent / 1e6:.1f} MB a layer, dense Ulysses {ulysses / 1e6:.1f} MB; kept/kv {kept:.3f}"
    saves = rows_of(directory, "checkpoint")
    if saves:
        interval = saves[0]["step"]
        cost = statistics.median(row["seconds"] for row in saves)
        line += f"  a checkpoint {cost:.2f} s, every {interval} steps {100 * cost / (interval * seconds):.1f} %"
    return line


def answer_lines(directory: Path) -> list[str]:
    rows = [row for row in rows_of(directory, "eval") if row["when"] == "after"]
    lines = []
    for name in caches_in_order(rows):
        mine = [row for row in rows if cache_of(row) == name]
        cells = [f"{row['task']} {row['exact_match']:.1f}" for row in mine]
        cache = f"{name} ({factor_name(row.get('cache_factor') for row in mine)})"
        lines.append(f"{directory.name:<28}{cache:>20}  {', '.join(cells)}")
    return lines


if __name__ == "__main__":
    directories = [Path(argument) for argument in sys.argv[1:]]
    print("\n".join(filter(None, map(step_line, directories))))
    print("exact match in percent after training, by cache (how many times smaller the cache was)")
    print("\n".join(line for directory in directories for line in answer_lines(directory)))
