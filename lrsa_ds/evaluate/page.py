"""The output of an evaluation as one self-contained HTML page: every prediction with the right answers."""

from html import escape

from lrsa_ds.evaluate.results import cache_name

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #1c2127; }}
input {{ font: inherit; padding: .3em .5em; width: 28em; margin-bottom: 1em; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .4em .7em; border-bottom: 1px solid #d8dee4; }}
th {{ position: sticky; top: 0; background: #fff; }}
td.said {{ white-space: pre-wrap; overflow-wrap: anywhere; max-width: 40em; }}
</style></head><body><h1>{title}</h1>
<input placeholder="show rows that contain ..." oninput="
  for (const row of document.querySelectorAll('tbody tr'))
    row.hidden = !row.textContent.toLowerCase().includes(this.value.toLowerCase())">
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""
HEADS = ("task", "tokens", "sample", "cache", "MB", "scores", "said", "right answers")


def predictions_page(samples: list[dict], title: str) -> str:
    """The page of all rows of `results.jsonl` that have a prediction; rows of one sample are adjacent."""
    said = [row for row in samples if "prediction" in row]
    said.sort(key=lambda row: (row["task"], row["length"], row["index"]))
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    return PAGE.format(title=escape(title), heads=heads, rows="\n".join(map(_line, said)))


def _line(row: dict) -> str:
    size = f"{row['cache_bytes'] / 1e6:,.1f}" if "cache_bytes" in row else ""
    scores = ", ".join(f"{name} {score:.0f}" for name, score in row["scores"].items())
    cache = cache_name(row["prefill"], row["retention"], row["layers"])
    plain = [row["task"], f"{row['length']:,}", str(row["index"]), cache, size, scores]
    cells = [f"<td>{escape(text)}</td>" for text in plain]
    cells += [f'<td class="said">{escape(text)}</td>' for text in (row["prediction"], "\n".join(row["answers"]))]
    return f"<tr>{''.join(cells)}</tr>"
