"""A run's record on disk, and its progress on a terminal and without one."""

import fcntl
import json
import os
import pty
import struct
import sys
import termios

import pytest

from lrsa_ds.errors import LRSAError
from lrsa_ds.logs import journal
from lrsa_ds.logs.journal import JSONLines, Progress, print_above
from lrsa_ds.logs.remaining import Remaining


def make_row(step, **other):
    row = {"step": step, "loss": 2.345, "lr": 1e-4, "tokens_per_second": 17204.4, "step_seconds": 0.5}
    return {**row, "peak_memory_gb": 21.3, **other}


def test_nan_and_infinity_are_valid_json(tmp_path):
    lines = JSONLines(tmp_path / "metrics.jsonl")
    lines.write(
        {"loss": float("nan"), "norm": float("-inf"), "layers": {"kept": [0.5, float("inf")]}, "path": tmp_path}
    )
    lines.write({"loss": 1.5})
    lines.close()
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=pytest.fail) == {
        "loss": None,
        "loss_text": "nan",
        "norm": None,
        "norm_text": "-inf",
        "layers": {"kept": [0.5, None]},
        "path": str(tmp_path),
    }
    assert json.loads(second) == {"loss": 1.5}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_sentence():
    lines = JSONLines("/dev/full")
    with pytest.raises(LRSAError, match=r"^/dev/full cannot be written: No space left on device\.$"):
        lines.write({"loss": 1.0})
    lines.close()


def test_directory_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(LRSAError, match="cannot be opened: No such file or directory"):
        JSONLines(tmp_path / "missing" / "metrics.jsonl")


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    progress = Progress(250)
    for step in range(1, 251):
        progress.show(make_row(step, peak_memory_gb=None if step == 1 else 21.3))
        now[0] += 1
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/250  loss 2.345  lr 1.0e-04  17,204 tokens/s  02:04 left"
    assert lines[1] == "step 11/250  loss 2.345  lr 1.0e-04  17,204 tokens/s  21.3 GB  03:59 left"
    assert lines[-1] == "step 250/250  loss 2.345  lr 1.0e-04  17,204 tokens/s  21.3 GB  00:00 left"
    assert len(lines) == 26


def test_progress_of_an_evaluation_begins_at_zero(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    progress = Progress(100, unit="answer", leave=False)
    for done in range(0, 101, 10):
        progress.show({"step": done})
        now[0] += 5
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["answer 0/100", "answer 20/100  00:40 left", "answer 40/100  00:30 left"]
    assert lines[-1] == "answer 100/100  00:00 left"


def test_progress_shows_what_is_left_of_the_run(capsys, monkeypatch):
    """An evaluation of 4 passes that take 10 s, 6 steps of 3 passes each, and the evaluation again: 10 + 45 + 10 s."""
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    remaining = Remaining(num_steps=6, passes_of_step=3, passes_of_evaluation=4, is_evaluated_after=True)
    progress = Progress(20, unit="answer", later=lambda seconds: remaining.after_evaluation(20 * seconds))
    for done in (0, 20):
        progress.show({"step": done})
        now[0] += 10
    progress = Progress(6, later=remaining.after_training)
    progress.show({"step": 1, "step_seconds": 8.0})
    now[0] += 10
    progress.show({"step": 2, "step_seconds": 10.0})
    assert capsys.readouterr().err.splitlines() == [
        "answer 0/20",
        "answer 20/20  00:00 left, 00:55 of the run",
        "step 1/6  00:40 left, 00:50 of the run",
        "step 2/6  00:40 left, 00:50 of the run",
    ]
    assert Remaining(6, 3, 4, is_evaluated_after=False).after_training(9.0) == 0


def test_progress_on_a_terminal_is_one_live_line(monkeypatch):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    with open(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        progress = Progress(3)
        progress.show(make_row(1))
        print_above("a message → above")
        progress.show(make_row(2))
        progress.show(make_row(3))
        progress.close()
        shown = b""
        while shown.count(b"\n") < 2:  # a terminal hands on what it has so far
            shown += os.read(parent, 100_000)
    os.close(parent)
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown.decode().split("\n")]  # what stays on the screen
    assert lines[0] == "a message → above"
    assert lines[1].startswith("step 3/3  loss 2.345  lr 1.0e-04  17,204 tokens/s  21.3 GB  00:00 left  █")
    assert lines[2:] == [""]


def test_message_that_the_terminal_cannot_encode_is_still_shown(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        print_above("0.0 → 100.0")
    assert (tmp_path / "out").read_text() == "0.0 ? 100.0\n"
