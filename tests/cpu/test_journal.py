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
from lrsa_ds.logs.metrics import RunLogger
from lrsa_ds.logs.remaining import Remaining
from lrsa_ds.settings.run import LogConfig


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


def left(**other):
    """An evaluation of 4 passes, 6 steps of 3 passes each, and the evaluation again; a pass is guessed as 2 s."""
    phases = dict(num_steps=6, passes_of_step=3, passes_of_evaluation=4, seconds_of_pass=2.0)
    return Remaining(**phases | dict(is_evaluated_before=True, is_evaluated_after=True) | other)


def test_progress_shows_what_is_left_of_the_run_from_its_first_second_to_its_end(tmp_path, capsys, monkeypatch):
    """The evaluation takes 10 s instead of 8, a step 10 s instead of 7.5; the first one takes 12, with its warm-up."""
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    logger = RunLogger(tmp_path, LogConfig(wandb="disabled"), {}, {"step": 0}, "run", 6)
    logger.expect(left())
    for when in ("before", "after"):
        for done in (0, 10, 20):
            logger.evaluating(when, done, 20)
            now[0] += 5 if done < 20 else 0
        now[0] += 10
        if when == "before":
            logger.step(make_row(1, step_seconds=12.0))
            for step in range(2, 7):
                now[0] += 10
                logger.step(make_row(step))
    logger.close()
    lines = [line.split("  ")[0] + "  " + line.split("  ")[-1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "loading the model  about 00:52 left of the run",  # 8 + 6 * 6 + 8
        "evaluation (before): answer 0/20  00:08 left, 00:52 of the run",
        "evaluation (before): answer 20/20  00:00 left, 00:55 of the run",  # 6 * 7.5 + 10
        "training  about 00:55 left of the run",
        "step 1/6  00:37 left, 00:47 of the run",  # 5 * 7.5 + 10
        *(f"step {step}/6  00:{10 * (6 - step):02} left, {journal.tqdm.format_interval(70 - 10 * step)} of the run"
          for step in range(2, 7)),
        "evaluation (after): answer 0/20  00:10 left",
        "evaluation (after): answer 20/20  00:00 left",
    ]  # fmt: skip


def test_the_time_left_of_other_runs():
    assert left(is_evaluated_before=False, first_step=4).of_run() == 2 * 6 + 8
    assert left(is_evaluated_after=False).from_step(5) == 6
    assert left(evaluated_every=2).from_step(0) == 6 * 6 + 2 * 8 + 8
    with_telemetry = left(passes_of_telemetry=10.0)
    assert with_telemetry.of_run() == 8 + 20 + 6 * 6 + 8 + 20
    assert with_telemetry.after_phase("telemetry before", 0) == 6 * 6 + 8 + 20
    assert with_telemetry.after_phase("after", 6) == 20 and with_telemetry.after_phase("telemetry after", 6) == 0


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
