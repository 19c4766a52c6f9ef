"""The table and the picture of a run's evaluations."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from lrsa_ds.errors import LRSAError
from lrsa_ds.logs.findings import findings
from lrsa_ds.logs.report import draw_evaluation, evaluation_table
from lrsa_ds.pictures import cache_colors

TASKS = ("signature", "passkey", "lookup")
FACTORS = {1.0: 1.0, 0.5: 1.88, 0.3: 2.5, 0.25: 2.906, 0.125: 4.267}


def make_rows(tasks=TASKS, retentions=(1.0, 0.5, 0.25, 0.125), times=("before", "after")):
    return [
        dict(
            when=when, task=task, retention=retention, cache_factor=FACTORS[retention],
            exact_match=100 * retention if when == "before" else 100.0, token_accuracy=87.54, nll=0.5, num_examples=48,
        )
        for when in times
        for retention in retentions
        for task in tasks
    ]  # fmt: skip


def test_table_shows_before_and_after_side_by_side():
    lines = evaluation_table(make_rows()).splitlines()
    assert all(task in lines[0] for task in TASKS) and lines[1].count("48 examples") == 3
    assert [line.split()[0] for line in lines[2:7]] == ["cache", "dense", "1/2", "1/4", "1/8"]
    assert lines[6].startswith("1/8      4.27x │  12.5→100.0   87.5→ 87.5 │")
    assert max(map(len, lines)) <= 100
    assert lines[8] == "before training → after training"


def test_table_shows_how_much_smaller_the_caches_were():
    """Beside the retention, which does not tell; a range where tasks differ; and a word where nothing was dropped."""
    rows = make_rows(tasks=("passkey", "lookup"))
    for row in rows:
        if row["task"] == "lookup" and row["retention"] < 1:
            row["cache_factor"] = 1.0 if row["retention"] == 0.5 else 2.0
    table = evaluation_table(rows)
    assert [line.split("│")[0].split() for line in table.splitlines()[3:7]] == [
        ["dense"],
        ["1/2", "1.00–1.88x"],
        ["1/4", "2.00–2.91x"],
        ["1/8", "2.00–4.27x"],
    ]
    assert "1.00x: the examples are too short for this cache to drop anything" in table
    assert "1.00x" not in evaluation_table(make_rows())
    for word in ("cache:", "dense:", "smaller:", "exact %:", "tokens %:"):
        assert word in table


def test_a_run_ends_with_three_sentences():
    rows = [row | {"num_examples": 4, "num_answers": 8} for row in make_rows()]
    seen, trust, advice = findings(rows, Path("run/evaluation.png"), Path("run/model"))
    assert seen == (
        "Seen: from the smallest cache (1/8, 4.27x smaller), 88 % (before training 88 %) of the tokens of answers are "
        "right and 100 % (before training 12 %) of the answers exact; from the largest (dense) 88 % and 100 %."
    )
    # Three tasks of four contexts, all right: 51 to 100 % each.
    assert trust.startswith("Trust: exact answers from that cache lie between 72 and 100 %")
    assert "(95 % interval of 24 answers about 12 contexts;" in trust and "run/evaluation.png" in trust
    assert "python -m lrsa_ds chat run/model FILE" in advice and "optim.num_steps" in advice
    seen, _, advice = findings(make_rows(times=("after",)), Path("evaluation.png"), None)
    assert "before" not in seen and "chat" not in advice and advice.startswith("Next: train longer (")


def test_table_of_one_task_before_training():
    lines = evaluation_table(make_rows(tasks=("passkey",), times=("before",))).splitlines()
    assert lines[6].split() == ["1/8", "4.27x", "│", "12.5", "87.5"]
    assert "before training" in lines
    assert "after" not in "".join(lines) and "→" not in "".join(lines)


def test_table_of_many_tasks_is_wrapped_and_cuts_no_name():
    tasks = [f"a_task_with_a_rather_long_name_{number}" for number in range(7)]
    table = evaluation_table(make_rows(tasks=tasks))
    assert max(map(len, table.splitlines())) <= 100
    assert table.count("smaller │") == 4 and table.count("48 examples") == 7
    longest = "a_name_" * 20
    assert all(task in evaluation_table(make_rows(tasks=[*tasks, longest])) for task in [*tasks, longest])


def test_table_marks_what_was_not_taken():
    rows = make_rows(tasks=("passkey",), retentions=(1.0,))
    rows += make_rows(tasks=("passkey",), retentions=(0.3,), times=("after",))
    rows[0]["token_accuracy"] = float("nan")
    dense, compressed = evaluation_table(rows).splitlines()[3:5]
    assert dense.split("│")[1].replace(" ", "") == "100.0→100.0-→87.5"
    assert compressed.split("│")[0].split() == ["0.3", "2.50x"]
    assert compressed.split("│")[1].replace(" ", "") == "-→100.0-→87.5"


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(),
        make_rows(tasks=("passkey",), times=("before",)),
        make_rows(tasks=[f"a_task_with_a_rather_long_name_{number}" for number in range(6)], retentions=(1.0, 0.3)),
        make_rows(tasks=("passkey", "lookup"), retentions=(1.0,)),
    ],
    ids=["three tasks", "one task before", "two lines of panels", "one retention"],
)
def test_picture_is_written_with_nothing_cut_off(tmp_path, rows):
    path = tmp_path / "evaluation.png"
    draw_evaluation(rows, path, "my_run: answers under a compressed KV cache")
    assert path.stat().st_size > 8000
    pixels = imread(path)[..., :3]
    assert (pixels.std(axis=(0, 1)) > 0.05).all()
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 1).all() for edge in edges), "something reaches over the edge of the picture"


def test_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(LRSAError, match="cannot be written: No such file"):
        draw_evaluation(make_rows(), tmp_path / "missing" / "evaluation.png", "my_run")


def test_of_many_evaluations_the_first_and_the_last_are_shown(tmp_path):
    rows = [
        row | {"exact_match": 10.0 * i}
        for i, when in enumerate(["step 10", "step 9", "step 100"])
        for row in make_rows(times=(when,))
    ]
    lines = evaluation_table(rows).splitlines()
    assert lines[3].split("│")[1].startswith("  10.0→ 20.0") and "at step 9 → at step 100" in lines
    draw_evaluation(rows, tmp_path / "picture.png", "title")
    assert imread(tmp_path / "picture.png").shape[0] > 300
    assert "before training → at step 100" in evaluation_table([*make_rows(times=("before",)), *rows])


def test_a_cache_has_one_colour_in_every_picture():
    layered = ["9 dense + 21 window", "6 dense + 24 window", "3 dense + 27 window"]
    several = cache_colors(["dense", "1/4", layered[0], "1/8", *layered[1:]])
    assert len(set(several.values())) == 6 and several["dense"] == "#000000"
    assert cache_colors(["dense", *layered]) == {name: several[name] for name in ("dense", *layered)}
    assert cache_colors(["1/8"]) == {"1/8": several["1/8"]}
