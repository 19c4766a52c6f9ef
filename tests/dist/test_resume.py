"""Runs that were killed, stopped, hung or out of disk space resume with the same result: real processes and signals."""

import json
import random
import shutil
import signal
import sys
import time

import psutil
import pytest
import torch

from lrsa_ds.train.checkpoint import find_checkpoint
from tests.dist.launcher import (
    Job,
    comes_true,
    last_step,
    launch_command,
    processes_of,
    rows_of,
    run,
    run_as_ranks,
    sentences,
    start_as_ranks,
    train_alone,
)
from tests.dist.test_launch import refused
from tests.helpers import wandb_records

pytestmark = pytest.mark.dist

NUM_STEPS = 14
SETTINGS = [
    "+recipe=smoke",
    f"optim.num_steps={NUM_STEPS}",
    "attention.layers=[{0-: 0.125}, {0: 1.0, rest: 0.0}, {1: 0.25, rest: 0.0}]",  # in turn, by step
    "eval.before=false",
    "eval.after=false",
    "eval.num_examples=1",
]


def settings(output, *more, every=3, wandb="disabled"):
    return [*SETTINGS, f"checkpoint.every={every}", f"log.wandb={wandb}", f"output_dir={output}", *more]


def training_rows(output):
    timed = ("tokens_per_second", "tflops_executed", "tflops_dense", "peak_memory_gb", "host_memory_gb", "kind")
    return [
        {k: v for k, v in row.items() if k not in timed and not k.endswith("_seconds")}
        for row in rows_of(output, "train")
    ]


def weights_of(output):
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks that nothing has disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run_as_ranks(*settings(output, "checkpoint.keep=9"))
    assert done.returncode == 0, done.stderr
    return output


def test_checkpoints_are_made_as_configured(whole, tmp_path):
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        f"step_{step:06d}" for step in (3, 6, 9, 12, NUM_STEPS)
    ]
    point = find_checkpoint(whole)
    assert point.step == NUM_STEPS and point.world_size == 2
    assert (whole / "COMPLETED").exists() and not (whole / "STOPPED").exists()


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_at_random_steps_it_ends_as_if_undisturbed(whole, tmp_path, num_kills):
    """Any rank, any step; the rows, the weights and the W&B run are those of one run."""
    output, draw = tmp_path / "run", random.Random(time.time_ns())
    wrote = output / "metrics.jsonl"
    for _ in range(num_kills):
        job = Job(launch_command(*settings(output, wandb="offline")))
        target = draw.randrange(last_step(output) // 3 * 3, NUM_STEPS - 1)
        started = time.time()
        # The rows of the run before stay in the file until this one has started.
        job.wait_for(lambda since=started: wrote.exists() and wrote.stat().st_mtime > since)
        victim = draw.choice(job.ranks())
        job.wait_for(lambda at=target: last_step(output) >= at)
        victim.kill()
        done = job.finish()
        assert done.returncode != 0
        assert len(sentences(done.stderr)) == 1 and "ended without a word" in done.stderr
        assert "Traceback" not in done.stderr
        assert processes_of(output) == []
        assert not (output / "COMPLETED").exists()
    done = run_as_ranks(*settings(output, wandb="offline"))
    assert done.returncode == 0, done.stderr
    assert training_rows(output) == training_rows(whole)
    for name, weight in weights_of(output).items():
        assert torch.equal(weight, weights_of(whole)[name]), name
    assert len({path.name.split("-")[-1] for path in output.glob("wandb/offline-run-*")}) == 1


@pytest.mark.parametrize(
    "num_ranks,changes",
    [
        (1, ["optim.grad_accum=2"]),
        (4, ["parallel.sp_size=2"]),
    ],
)
def test_another_number_of_ranks_goes_on(whole, tmp_path, num_ranks, changes):
    """And another SP size: as many sequences in a step, and the same loss to 1e-5."""
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_000006", output / "checkpoints" / "step_000006")
    done = run_as_ranks(*settings(output, *changes), num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 6" in done.stdout
    rows, expected = training_rows(output), training_rows(whole)[6:]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["step"] == wanted["step"] and row["num_target_tokens"] == wanted["num_target_tokens"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        assert row["lr"] == wanted["lr"]


@pytest.mark.parametrize("stage,num_ranks", [(1, 1), (2, 2)])
def test_other_zero_stages_go_on_too(tmp_path, stage, num_ranks):
    """At another number of ranks, and at the same."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    command = [f"zero.stage={stage}", "optim.num_steps=4", "checkpoint.export=false", "checkpoint.keep=3"]
    done = run_as_ranks(*settings(whole, *command, every=2))
    assert done.returncode == 0, done.stderr
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_000002", output / "checkpoints" / "step_000002")
    done = run_as_ranks(*settings(output, *command, f"optim.grad_accum={2 // num_ranks}", every=2), num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    for row, wanted in zip(training_rows(output), training_rows(whole)[2:], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_stops_the_run_after_a_checkpoint(whole, tmp_path, to_all):
    """SIGTERM to the whole job, as a scheduler sends it, or SIGUSR1 to one rank."""
    output = tmp_path / "run"
    job = Job(launch_command(*settings(output, every=0)))
    job.wait_for(lambda: last_step(output) >= 4)
    if to_all:
        job.signal_all(signal.SIGTERM)
    else:
        job.ranks()[1].send_signal(signal.SIGUSR1)
    done = job.finish()
    step = last_step(output)
    assert f"stopped after step {step} by" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode != 0 and (to_all or done.returncode == 75)
    assert processes_of(output) == []
    assert (output / "STOPPED").exists() and find_checkpoint(output).step == step
    if to_all:
        done = run_as_ranks(*settings(output, every=0))
        assert done.returncode == 0, done.stderr
        assert training_rows(output) == training_rows(whole)
        assert not (output / "STOPPED").exists()


def killed_during_a_save(directory, *changes, tries=5):
    """The directory of a run that was killed while it wrote its second checkpoint."""
    for number in range(tries):
        output = directory / f"run_{number}"
        ranks = start_as_ranks(*settings(output, *changes))
        begun = comes_true((output / "checkpoints" / "step_000006.partial").exists, ranks.has_ended)
        done = ranks.finish(timeout=0)
        assert begun, done
        if not (output / "checkpoints" / "step_000006").exists():  # on a busy machine the kill may come too late
            return output
    raise AssertionError(f"each of {tries} kills came after the checkpoint was whole")


@pytest.mark.parametrize("write", ["wait", "background"])
def test_a_kill_during_a_save_leaves_the_earlier_checkpoint(whole, tmp_path, write):
    output = killed_during_a_save(tmp_path, f"checkpoint.write={write}")
    assert find_checkpoint(output).step == 3
    done = run_as_ranks(*settings(output))
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stdout
    assert not list(output.glob("checkpoints/*.partial"))
    assert training_rows(output) == training_rows(whole)


def test_a_rank_that_hangs_is_named(tmp_path):
    output = tmp_path / "run"
    job = Job(launch_command(*settings(output, "parallel.timeout=8", "optim.num_steps=5000")))
    job.wait_for(lambda: last_step(output) >= 4)
    other, victim = job.ranks()
    victim.suspend()
    job.wait_for(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE)
    victim.resume()  # or the launcher would wait half a minute for it before it kills it
    done = job.finish()
    assert done.returncode != 0
    (sentence,) = sentences(done.stderr)
    assert "rank 1 gives no sign of life" in sentence
    assert processes_of(output) == []
    assert last_step(output) - 3 <= find_checkpoint(output).step <= last_step(output)


def test_written_in_the_background_it_is_the_state_of_its_step(whole, tmp_path):
    """The training continues while the checkpoint of step 6 is written, and a run from there ends alike."""
    first, output = tmp_path / "first", tmp_path / "run"
    done = run_as_ranks(*settings(first, "checkpoint.write=background", "checkpoint.keep=9"))
    assert done.returncode == 0, done.stderr
    assert training_rows(first) == training_rows(whole)
    rows = rows_of(first, "checkpoint")
    assert [row["step"] for row in rows] == [3, 6, 9, 12, NUM_STEPS]
    assert all(0 < row["seconds"] <= row["seconds_until_whole"] for row in rows)
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(first / "checkpoints" / "step_000006", output / "checkpoints" / "step_000006")
    done = run_as_ranks(*settings(output))
    assert done.returncode == 0, done.stderr
    assert training_rows(output) == training_rows(whole)[6:]


@pytest.mark.parametrize("write", ["wait", "background"])
def test_a_full_disk_at_a_checkpoint_is_one_sentence(tmp_path, write):
    """A limit on the size of a file stands for a full disk."""
    output = tmp_path / "run"
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", sys.executable, "launch/train.py"]
    done = run([*limited, *settings(output, f"checkpoint.write={write}")])
    assert done.returncode == 2
    assert "step_000003 could not be written" in done.stderr and "Traceback" not in done.stderr
    assert last_step(output) in ((3,) if write == "wait" else (4, 5, 6)) and find_checkpoint(output) is None


def test_what_a_run_must_not_change_when_it_goes_on(whole, tmp_path, capfd, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "COMPLETED").unlink()
    command = settings(output, "checkpoint.keep=9")
    said = refused(capfd, monkeypatch, *command, "optim.lr=1e-4", "seed=3")
    assert "holds step 14 of a run with other settings, optim.lr=0.0001 (was 0.003), seed=3 (was 0)" in said
    assert "checkpoint.overwrite=true" in said
    assert "set checkpoint.resume=auto" in refused(capfd, monkeypatch, *command, "checkpoint.resume=never")
    trainer = output / "checkpoints" / f"step_{NUM_STEPS:06d}" / "trainer.json"
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | {"data": "other rows"}))
    assert "over other data (it was other rows, and is 64 questions over" in refused(capfd, monkeypatch, *command)


def test_a_changed_data_file_is_noticed_and_may_be_accepted(tmp_path, capfd, monkeypatch):
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"prompt": f"{i} " * 40, "completion": f"{i}."} for i in range(20)]
    rows[3] = {"prompt": "This is bad.", "completion": " "}

    def write():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    command = settings(output, "data=files", f"data.path={data}", "checkpoint.export=false", every=2)
    command += ["optim.num_steps=4", "optim.warmup_steps=1"]
    assert "line 4: completion is empty" in refused(capfd, monkeypatch, *command)
    done = train_alone(*command, "data.on_bad_row=skip")
    assert done.returncode == 0, done.stderr
    assert f"left out: {data}, line 4: completion is empty." in done.stdout
    assert sum(row.get("num_left_out_rows", 0) for row in rows_of(output, "train")) > 0
    (output / "COMPLETED").unlink()
    shutil.rmtree(output / "checkpoints" / "step_000004")
    rows[3]["completion"] = "7"  # one byte for another: the file is as long as before
    write()
    said = refused(capfd, monkeypatch, *command)
    assert "over other data" in said and str(data) in said and "checkpoint.accept_data_change=true" in said
    accepted = [*command, "checkpoint.accept_data_change=true", "seq_len=2048"]
    assert "optim.lr=0.1 (was 0.003)" in refused(capfd, monkeypatch, *accepted, "optim.lr=0.1")
    done = train_alone(*accepted)
    assert done.returncode == 0, done.stderr
    assert (
        "the data have changed (seq_len=2048 (was 1024)" in done.stdout
        and "the run resumes at the same place" in done.stdout
    )
    assert [row["step"] for row in rows_of(output, "train")] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path):
    output = tmp_path / "run"
    done = run_as_ranks(*settings(output, "optim.lr=1e30", "optim.grad_clip=0", "optim.warmup_steps=0"))
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is not finite at samples" in sentence and "optim.on_nan=skip" in sentence
    assert (output / "console.log").read_text().splitlines().count(sentence) == 1
    assert "Traceback" not in done.stderr


def test_wandb_goes_on_with_the_same_run(tmp_path):
    output = tmp_path / "run"
    short = ["optim.warmup_steps=1", "checkpoint.export=false"]
    job = Job([sys.executable, "launch/train.py", *settings(output, *short, every=2, wandb="offline")])
    job.wait_for(lambda: last_step(output) >= 3)
    job.signal_all(signal.SIGTERM)
    assert job.finish().returncode == 75
    run_id = (output / "wandb_run.txt").read_text().strip()
    done = train_alone(*settings(output, *short, every=2, wandb="offline"))
    assert done.returncode == 0, done.stderr
    newest = max(output.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)
    shutil.rmtree(next(p for p in output.glob("wandb/offline-run-*") if p != newest))
    (record,) = (r.run for r in wandb_records(output) if r.HasField("run"))
    assert record.run_id == run_id
