"""The table and the picture of a run's evaluations."""

import pytest
from matplotlib.image import imread

from lrsa_ds.errors import LRSAError
from lrsa_ds.report import draw_evaluation, evaluation_table

TASKS = ("signature", "passkey", "lookup")


def make_rows(tasks=TASKS, retentions=(1.0, 0.5, 0.25, 0.125), times=("before", "after")):
    return [
        dict(
            when=when, task=task, retention=retention, exact_match=100 * retention if when == "before" else 100.0,
            token_accuracy=87.54, nll=0.5, num_examples=48,
        )
        for when in times
        for retention in retentions
        for task in tasks
    ]  # fmt: skip


def test_table_shows_before_and_after_side_by_side():
    lines = evaluation_table(make_rows()).splitlines()
    assert all(f"{task} (48 examples)" in lines[0] for task in TASKS)
    assert [line.split()[0] for line in lines[1:6]] == ["cache", "full", "2x", "4x", "8x"]
    assert lines[5].startswith("8x    │  12.5 → 100.0   87.5 →  87.5 │")
    assert max(map(len, lines)) <= 100
    assert "before training → after training" in lines[-1]


def test_table_of_one_task_before_training():
    lines = evaluation_table(make_rows(tasks=("passkey",), times=("before",))).splitlines()
    assert lines[5].split() == ["8x", "│", "12.5", "87.5"]
    assert lines[-1].startswith("before training;")
    assert "after" not in lines[-1] and "→" not in "".join(lines)


def test_table_of_many_tasks_is_wrapped():
    tasks = [f"a_task_with_a_rather_long_name_{number}" for number in range(7)]
    table = evaluation_table(make_rows(tasks=tasks))
    assert max(map(len, table.splitlines())) <= 100
    assert table.count("cache") == 3 and table.count("(48 examples)") == 7


def test_table_marks_what_was_not_taken():
    rows = make_rows(tasks=("passkey",), retentions=(1.0,))
    rows += make_rows(tasks=("passkey",), retentions=(0.3,), times=("after",))
    rows[0]["token_accuracy"] = float("nan")
    full, compressed = evaluation_table(rows).splitlines()[2:4]
    assert full.split() == ["full", "│", "100.0", "→", "100.0", "-", "→", "87.5"]
    assert compressed.split() == ["3.3x", "│", "-", "→", "100.0", "-", "→", "87.5"]


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(),
        make_rows(tasks=("passkey",), times=("before",)),
        make_rows(tasks=[f"task_{number}" for number in range(6)], retentions=(1.0, 0.3)),
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
    assert lines[2].startswith("full  │  10.0 →  20.0") and lines[-1].startswith("at step 9 → at step 100;")
    draw_evaluation(rows, tmp_path / "picture.png", "title")
    assert imread(tmp_path / "picture.png").shape[0] > 300
    assert "before training → at step 100" in evaluation_table([*make_rows(times=("before",)), *rows])
