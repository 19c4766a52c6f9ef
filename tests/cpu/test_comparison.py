"""Runs compared question by question: means, paired intervals, and what cannot be compared."""

import csv
import json
import random
import sys

import pytest
import torch
from matplotlib.image import imread

import launch.compare
from lrsa_ds.comparison import Group, compare, draw, markdown_table, read_group, write_csv
from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.errors import LRSAError
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.settings.caches import NamedCache
from lrsa_ds.train.answers import answer_rows, fingerprint
from tests.helpers import ROOT

CACHES = {"dense": (1.0, 1.0), "3 dense + 27 window": (0.1, 8.0)}


def answers(quality, seed=0, num_contexts=40, task="qa", caches=CACHES):
    """Rows of a run: three answers of four tokens to each context, which some contexts make hard for every run."""
    draw = random.Random(f"{quality} {seed}")
    rows = []
    for context in range(num_contexts):
        hard = (context * 7919 % 10) / 10
        for answer in range(3):
            for cache, (retention, factor) in caches.items():
                right = sum(draw.random() < quality * (1 - 0.8 * hard) for _ in range(4))
                row = {"when": "after", "task": task, "context": f"c{context}", "answer": answer, "cache": cache}
                row |= {"retention": retention, "cache_factor": factor, "num_tokens": 4, "num_correct": right}
                rows.append(row | {"nll": 4.0 - right})
    return rows


def group(name, *runs):
    return Group(name, [ROOT / f"{name}_{place}" for place in range(len(runs))], list(runs))


def test_means_and_differences_are_those_of_all_questions():
    runs = {"dense": [answers(0.6, seed) for seed in (1, 2)], "lrsa": [answers(0.8, seed) for seed in (1, 2)]}
    rows = compare([group(name, *mine) for name, mine in runs.items()])
    assert [(row["cache"], row["group"]) for row in rows] == [(c, g) for c in CACHES for g in runs]
    for row in rows:
        mine = [r for run in runs[row["group"]] for r in run if r["cache"] == row["cache"]]
        tokens = sum(r["num_tokens"] for r in mine)
        assert row["token_accuracy"] == pytest.approx(100 * sum(r["num_correct"] for r in mine) / tokens)
        exact = sum(r["num_correct"] == r["num_tokens"] for r in mine)
        assert row["exact_match"] == pytest.approx(100 * exact / len(mine))
        assert row["nll"] == pytest.approx(sum(r["nll"] for r in mine) / tokens)
        assert (row["num_questions"], row["num_contexts"], row["num_runs"]) == (120, 40, 2)
        for metric in ("token_accuracy", "exact_match", "nll"):
            assert row[f"{metric}_low"] < row[metric] < row[f"{metric}_high"]
    for base, other in zip(rows[::2], rows[1::2], strict=True):
        assert "token_accuracy_difference" not in base
        difference = other["token_accuracy"] - base["token_accuracy"]
        assert other["token_accuracy_difference"] == pytest.approx(difference)
        assert 0 < other["token_accuracy_difference_low"] < difference < other["token_accuracy_difference_high"]
        # Paired: what makes a context hard for all does not widen the interval of the difference.
        width = other["token_accuracy_difference_high"] - other["token_accuracy_difference_low"]
        assert width < other["token_accuracy_high"] - other["token_accuracy_low"]


def test_equal_runs_differ_by_nothing_and_order_does_not_matter():
    run = answers(0.7)
    shuffled = random.Random(0).sample(run, len(run))
    for row in compare([group("a", run), group("b", shuffled)])[1::2]:
        assert all(row[f"nll_difference{end}"] == pytest.approx(0) for end in ("", "_low", "_high"))
    again = compare([group("a", run), group("b", shuffled)])
    assert again == compare([group("a", run), group("b", shuffled)])


def test_runs_of_one_place_may_be_asked_what_others_are_not():
    other = [row | {"context": f"other {row['context']}"} for row in answers(0.5, 3)]
    rows = compare([group("a", answers(0.5, 1), other), group("b", answers(0.9, 1), other)])
    assert rows[0]["num_contexts"] == 80 and rows[0]["num_questions"] == 120
    assert rows[1]["token_accuracy_difference"] > 5


def test_what_cannot_be_compared(tmp_path):
    run = answers(0.5)
    wrong = {
        "1 runs and b 2: give as many of each": [run, run],
        r"a_0 and .*b_0 were not asked the same questions .*: 234 answers of 240 and 234": [run[6:]],
        "caches of different sizes under one name .3 dense": [
            [row | {"cache_factor": 4.0 if row["retention"] < 1 else 1.0} for row in run]
        ],
        "0 answers of 240 and 240 are in both": [[row | {"context": "x" + row["context"]} for row in run]],
    }
    for said, runs in wrong.items():
        with pytest.raises(LRSAError, match=said):
            compare([group("a", run), group("b", *runs)])
    with pytest.raises(LRSAError, match="give two groups"):
        compare([group("a", run)])
    with pytest.raises(LRSAError, match=r"answers.jsonl does not exist"):
        read_group("a", [tmp_path], "after")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run))
    assert read_group("a", [tmp_path], "after").rows == [run]
    with pytest.raises(LRSAError, match="has no answers of the evaluation 'before'"):
        read_group("a", [tmp_path], "before")


def test_table_csv_and_picture(tmp_path):
    rows = compare([group("dense", answers(0.6)), group("lrsa", answers(0.8))])
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| task | cache | dense: exact % / tokens % / nll | lrsa: ") and len(lines) == 6
    assert "lrsa − dense" in lines[0] and lines[3].startswith(
        "| qa (120 questions) | 3 dense + 27 window, 8.00x smaller"
    )
    assert len({line.count("|") for line in lines[:4]}) == 1 and "Mean over 1 run of each" in lines[5]
    write_csv(rows, tmp_path / "all.csv")
    written = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [float(row["nll"]) for row in written] == [row["nll"] for row in rows]
    draw(rows, tmp_path / "all.png")
    assert imread(tmp_path / "all.png").std() > 0.05
    for write in (write_csv, draw):
        with pytest.raises(LRSAError, match="cannot be written"):
            write(rows, tmp_path / "no" / "such")


def test_the_command(tmp_path, monkeypatch, capsys):
    for name, quality in (("one", 0.5), ("two", 0.7), ("odd", 0.7)):
        (tmp_path / name).mkdir()
        rows = answers(quality, num_contexts=4 if name == "odd" else 9)
        (tmp_path / name / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*groups):
        monkeypatch.setattr(sys, "argv", ["compare.py", *groups, "--output", f"{tmp_path}/out"])
        return launch.compare.main(), *capsys.readouterr()

    code, said, _ = command(f"dense={tmp_path}/one", f"lrsa={tmp_path}/two")
    assert code == 0 and said == (tmp_path / "out" / "comparison.md").read_text() and "27 questions" in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"comparison.md", "comparison.csv", "comparison.png"}
    code, _, said = command(f"dense={tmp_path}/one", f"lrsa={tmp_path}/odd")
    assert code == 2 and "were not asked the same questions" in said
    code, _, said = command(f"dense={tmp_path}/one", "lrsa")
    assert code == 2 and "lrsa is not a group of runs: write NAME=RUN,RUN" in said


def test_rows_of_answers():
    example = Example([1, 2, 3, 4, 5, 6], [IGNORE, IGNORE, 3, IGNORE, 5, 6], "qa", 0)
    config = LRSAConfig(sink_size=0, lag_size=2, retention=0.5)
    totals = torch.tensor([[1, 1, 0.5], [2, 1, 3.0]], dtype=torch.float64)
    rows = answer_rows([example], NamedCache("1/2", 0.5, config), totals, [2])
    assert [(row["answer"], row["num_tokens"], row["num_correct"], row["nll"]) for row in rows] == [
        (0, 1, 1, 0.5),
        (1, 2, 1, 3.0),
    ]
    assert rows[0]["cache_factor"] == 6 / 4 and rows[0]["context"] == fingerprint(example)
    other = Example([1, 2, 3, 4, 5, 6], [IGNORE] * 5 + [6], "qa", 0)
    assert fingerprint(other) != fingerprint(example)
