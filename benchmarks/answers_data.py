"""Passages with questions as rows for training and for held-out articles: `benchmarks/answers.sh` trains on them.

    python benchmarks/answers_data.py passages.jsonl.gz outputs/answers/data

A line of the file is {source, article, passage, questions: [{question, answers}]}. Of each source a quarter of the
articles, chosen by a fixed seed, is held out. Writes SOURCE_train.jsonl and SOURCE_test.jsonl (rows with context,
question, answers, title, task) and texts.jsonl (the text of passages that are trained on).
"""

import argparse
import gzip
import json
import random
from pathlib import Path

SHARE_HELD_OUT = 0.25


def held_out(passages: list[dict]) -> set[str]:
    """The articles of each source that are never trained on."""
    chosen: set[str] = set()
    for source in sorted({passage["source"] for passage in passages}):
        articles = sorted({passage["article"] for passage in passages if passage["source"] == source})
        random.Random(f"answers {source}").shuffle(articles)
        chosen.update(articles[: max(1, round(SHARE_HELD_OUT * len(articles)))])
    return chosen


def rows_of(passage: dict) -> list[dict]:
    common = {"context": passage["passage"], "title": passage["article"], "task": passage["source"]}
    return [common | {"question": q["question"], "answers": q["answers"]} for q in passage["questions"]]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passages", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    with gzip.open(options.passages, "rt", encoding="utf-8") as file:
        passages = [json.loads(line) for line in file]
    test = held_out(passages)
    options.output.mkdir(parents=True, exist_ok=True)
    for source in sorted({passage["source"] for passage in passages}):
        for part in ("train", "test"):
            mine = [p for p in passages if p["source"] == source and (p["article"] in test) == (part == "test")]
            write(options.output / f"{source}_{part}.jsonl", [row for passage in mine for row in rows_of(passage)])
    trained = [passage for passage in passages if passage["article"] not in test]
    write(options.output / "texts.jsonl", [{"text": passage["passage"]} for passage in trained])


if __name__ == "__main__":
    main()
