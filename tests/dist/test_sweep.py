"""Sweeps as users start them: several runs, one that fails, a stop and the rest of it, and Hydra's plugins."""

import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.image import imread

from lrsa_ds.sweep import job_directory, job_name, sweep_table
from lrsa_ds.sweep_picture import draw_sweep
from tests.dist.launcher import Job, processes_of, run, run_alone

pytestmark = pytest.mark.dist
SHORT = ["+recipe=smoke", "log.wandb=disabled", "eval.before=false", "eval.num_examples=1", "optim.num_steps=3"]
ONE_RANK = ["--launcher", "--num_accelerators 1"]


def sweep(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "launch/sweep.py", *SHORT, f"output_dir={output}", *ONE_RANK, *arguments]


def test_a_sweep_goes_on_after_a_failed_job_and_after_a_stop(tmp_path):
    """Two jobs at once; one has a value that is not valid."""
    swept = ["attention.retention=0.125,7", "attention.lag_size=32,64"]  # instead of the values of the sweep
    command = sweep(tmp_path, "+sweep=retention_lag", "--at-once", "2", *swept)
    first = Job(command)
    first.wait_for(lambda: any(tmp_path.glob("*/COMPLETED")))
    first.process.send_signal(signal.SIGINT)
    done = first.finish()
    assert done.returncode == 130 and "the same command resumes the sweep" in done.stderr
    assert processes_of(tmp_path) == []
    finished = {path.parent.name: path.stat().st_mtime for path in tmp_path.glob("*/COMPLETED")}

    done = run(command)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count(": done before") == len(finished)
    assert done.stdout.count("attention.retention=7 is not valid: give the share") == 2
    assert {p.parent.name for p in tmp_path.glob("*/COMPLETED")} == {
        "retention-0.125_lag_size-32",
        "retention-0.125_lag_size-64",
    }
    assert all((tmp_path / name / "COMPLETED").stat().st_mtime == time for name, time in finished.items())
    table = (tmp_path / "sweep.txt").read_text()
    *lines, _, legend = table.splitlines()
    assert table in done.stdout + "\n" and legend.startswith("smaller: tokens seen / entries held")
    assert [line.split()[-1] for line in lines] == ["status", "done", "done", "failed", "failed"]
    assert imread(tmp_path / "sweep.png").shape[0] > 300
    config = (tmp_path / "retention-0.125_lag_size-32" / "config.yaml").read_text()
    assert f"group: {tmp_path.name}" in config and "lag_size: 32" in config

    other = run([*command, "seed=5", "attention.retention=0.125"])
    assert other.stdout.count("holds a finished run of other settings") == 2


def test_optuna_chooses_the_values(tmp_path):
    assert find_spec("hydra_plugins.hydra_optuna_sweeper")
    done = run(sweep(tmp_path, "+sweep=optuna_lr", "hydra.sweeper.n_trials=1"))
    assert done.returncode == 0, done.stderr
    jobs = [json.loads(path.read_text()) for path in tmp_path.glob("*/job.json")]
    assert len(jobs) == 1 and all(set(job["swept"]) == {"optim.lr", "attention.retention"} for job in jobs)
    both = run(sweep(tmp_path, "+sweep=optuna_lr", "--at-once", "2"))
    assert both.returncode == 2 and "--at-once works only with Hydra's basic sweeper" in both.stderr


def test_submitit_starts_the_jobs_elsewhere(tmp_path):
    """Its local executor does what that of Slurm does, without Slurm: processes of their own, from pickles."""
    here = f"hydra.sweep.dir={tmp_path}/submitit"
    command = sweep(
        tmp_path / "runs", "--multirun", "hydra/launcher=submitit_local", here, "attention.retention=0.125,0.5"
    )
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/COMPLETED"))) == 2


@pytest.mark.parametrize(
    "command,said",
    [
        (["sweep", "+recipe=smoke"], "a sweep needs --multirun with values such as optim.lr=1e-5,2e-5"),
        (["sweep", "-m", "+recipe=smoke", "optim.lr=1,2", "seed=s", "optim.betaa=1"], "(2) "),
        (["sweep", "-m", "+recipe=nope", "optim.lr=1,2"], "there is no recipe/nope; valid here: "),
        (["sweep", "-m", "+recipe=smoke", "seed=1,2", "--at-once", "0"], "--at-once=0 is not valid"),
        (["train", "-m", "+recipe=smoke", "seed=1,2"], "python launch/sweep.py --multirun"),
    ],
)
def test_mistakes(command, said):
    done = run_alone(*command)
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in sentence


def test_table_and_picture_of_many_jobs(tmp_path):
    rows = [
        dict(
            swept={"a.x": str(x), "b": y},
            status="done",
            cache_factor=4.267,
            score=10.0 * x,
            tokens=50.0,
            loss=1.234,
            step_seconds=0.1 * x,
        )
        for x in (1, 2, 10)
        for y in ("p", "q")
    ]
    rows.append(dict(swept={"a.x": "10", "b": "r"}, status="failed"))
    *lines, _, _ = sweep_table(rows).splitlines()
    assert lines[0].split() == ["x", "b", "smaller", "exact", "%", "tokens", "%", "loss", "s/step", "GB", "status"]
    assert lines[1].split() == ["1", "p", "4.27", "10", "50", "1.23", "0.1", "-", "done"]
    assert lines[-1].split() == ["10", "r", "-", "-", "-", "-", "-", "-", "failed"]
    draw_sweep(rows, tmp_path / "sweep.png", "title")
    assert imread(tmp_path / "sweep.png").shape[0] > 300


def test_names_of_jobs_are_told_apart_and_read_back_by_hydra():
    swept = [
        {"optim.lr": "1e-05", "attention.retention": "0.25"},
        {"optim.lr": "1e+05", "attention.retention": "[0.125,1.0]"},
        *({"model.name": name} for name in ("a/b c", "a-b-c", "a/b/c", "'a'", "../x", "-x", "é" * 300, "a" * 300)),
        {},
    ]
    names = [job_directory(values) for values in swept]
    assert names[0] == "lr-1e-05_retention-0.25" and names[-1] == "job"
    assert len(set(names)) == len(names) and max(map(len, names)) < 128
    for name in names:
        (override,) = OverridesParser.create().parse_overrides([f"model.name=outputs/sweep/{name}/model"])
        assert override.value() == f"outputs/sweep/{name}/model"
    assert job_name(swept[0]) == "lr=1e-05,retention=0.25"
