"""Signals as users and schedulers send them, to the launcher alone or to all of a terminal's processes."""

import signal
import sys
import time

import pytest

from lrsa_ds.train.checkpoint import find_checkpoint
from tests.dist.launcher import Job, last_step, launch_command, processes_of, rows_of, torchrun_command

pytestmark = pytest.mark.dist

# A procedure of one's own whose training data never come.
WAITING = """
import time
from pathlib import Path

import torch.distributed as dist

from recipes import qa


def wait(epoch, first=0):
    if dist.is_initialized():
        (Path(__file__).parent / "waits").touch()
        time.sleep(600)
    return iter([])


def prepare(config, tokenizer):
    data = qa.prepare(config, tokenizer)
    data.examples_of_rows = wait
    return data
"""


def settings(output, *more: str) -> list[str]:
    """A run that would take minutes."""
    return [
        *["+recipe=smoke", "optim.num_steps=5000", "eval.before=false", "eval.num_examples=1", "log.wandb=disabled"],
        "data.num_workers=1",
        *[f"output_dir={output}", *more],
    ]


def assert_stopped(output, done, by: str) -> None:
    step = last_step(output)
    assert done.stderr.count(f"stopped after step {step} by {by}") == 1, done.stderr
    assert (output / "STOPPED").exists() and find_checkpoint(output).step == step
    assert processes_of(output) == []


def of_ours(stderr: str) -> list[str]:
    """The lines of tracebacks that name a file of this project."""
    return [
        line
        for line in stderr.splitlines()
        if line.lstrip().startswith("File ")
        and "site-packages" not in line
        and ("/lrsa_ds/" in line or "/launch/" in line)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_notice_that_the_deepspeed_process_is_gone(tmp_path, number):
    job = Job(launch_command(*settings(tmp_path)))
    job.wait_for(lambda: last_step(tmp_path) >= 3)
    job.process.send_signal(number)
    done = job.finish()  # when the last process has closed its output
    assert_stopped(tmp_path, done, "the end of its launcher")
    assert done.returncode == -number


def test_the_deepspeed_process_is_gone_before_the_run_has_begun(tmp_path):
    job = Job(launch_command(*settings(tmp_path)))
    job.wait_for(job.ranks)
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    assert processes_of(tmp_path) == [] and not (tmp_path / "COMPLETED").exists()


@pytest.mark.parametrize("command", [launch_command, torchrun_command])
def test_ctrl_c_stops_the_run_after_a_checkpoint(tmp_path, command):
    """A terminal sends SIGINT to all processes; torchrun sends it to its ranks once more."""
    job = Job(command(*settings(tmp_path)))
    job.wait_for(lambda: last_step(tmp_path) >= 3)
    job.signal_all(signal.SIGINT)
    done = job.finish()
    assert_stopped(tmp_path, done, "SIGINT")
    assert of_ours(done.stderr) == []
    assert done.returncode != 0


def test_a_signal_during_the_last_evaluation(tmp_path):
    """Then too there is a checkpoint, and the run resumes from it."""
    short = ["optim.num_steps=2", "optim.warmup_steps=1", "eval.num_examples=400", "checkpoint.export=false"]
    command = [sys.executable, "launch/train.py", *settings(tmp_path, *short)]
    job = Job(command)
    job.wait_for(lambda: last_step(tmp_path) == 2)
    job.process.send_signal(signal.SIGTERM)
    done = job.finish()
    assert done.returncode == 75
    assert_stopped(tmp_path, done, "SIGTERM")
    assert rows_of(tmp_path, "eval") == []


def test_the_second_ctrl_c_does_not_wait(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    job = Job([sys.executable, "launch/train.py", *settings(tmp_path / "run", f"procedure={tmp_path}/waiting.py")])
    job.wait_for((tmp_path / "waits").exists)
    job.process.send_signal(signal.SIGINT)
    time.sleep(1.5)  # a second one at once may be the first, passed on by a launcher
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    done = job.finish()
    assert done.returncode == 130
    assert "interrupted twice" in done.stderr and "Traceback" not in done.stderr
