"""Whichever rank has the sentence, and whenever: it is said once, through either launcher."""

import pytest

from tests.dist.launcher import Job, launch_command, processes_of, sentences, torchrun_command

pytestmark = pytest.mark.dist

# A procedure of one's own that fails on some ranks, before there is a process group or in the first step.
FAILING = """
import os
from functools import partial

import torch.distributed as dist

from lrsa_ds.errors import LRSAError
from recipes import qa


def fail(when):
    if when == os.environ["FAIL_WHEN"] and os.environ["RANK"] in os.environ["FAIL_RANKS"].split(","):
        raise LRSAError("the well is dry: dig deeper.")


def rows(read, epoch, first=0):
    fail("in the first step" if dist.is_initialized() else "never")
    return read(epoch, first)


def prepare(config, tokenizer):
    fail("at the start")
    data = qa.prepare(config, tokenizer)
    data.examples_of_rows = partial(rows, data.examples_of_rows)
    return data
"""
FAST = (
    ("deepspeed", "at the start", "1"),
    ("deepspeed", "in the first step", "0,1"),
    ("torchrun", "at the start", "0,1"),
    ("torchrun", "in the first step", "1"),
)
ALL = [
    (launcher, when, ranks)
    for launcher in ("deepspeed", "torchrun")
    for when in ("at the start", "in the first step")
    for ranks in ("0", "1", "0,1")
]


@pytest.mark.parametrize(
    "launcher,when,ranks",
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in ALL],
)
def test_the_sentence_is_said_once(tmp_path, launcher, when, ranks):
    (tmp_path / "failing.py").write_text(FAILING)
    command = launch_command if launcher == "deepspeed" else torchrun_command
    job = Job(
        command(
            *["+recipe=smoke", f"procedure={tmp_path}/failing.py", f"output_dir={tmp_path}/run", "log.wandb=disabled"],
            *["eval.before=false", "eval.num_examples=1"],
        ),
        env={"FAIL_WHEN": when, "FAIL_RANKS": ranks},
    )
    done = job.finish()
    assert sentences(done.stderr) == ["error: the well is dry: dig deeper."], done.stderr
    assert done.returncode == (2 if launcher == "deepspeed" else 1)  # torchrun has one code for all failures
    assert launcher == "torchrun" or "Traceback" not in done.stderr
    assert processes_of(tmp_path) == []
