"""Runs that cannot start, and what is said: real processes with the variables of their starters."""

import socket
import sys

import pytest

from tests.dist.launcher import Job, sentences
from tests.dist.test_launch import refused
from tests.helpers import free_port

pytestmark = pytest.mark.dist
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def refused_as(capfd, monkeypatch, tmp_path, *arguments: str, **variables: str) -> str:
    for name, value in (RANK | {"MASTER_PORT": str(free_port())} | variables).items():
        monkeypatch.setenv(name, value)
    command = ["+recipe=smoke", "log.wandb=disabled", f"output_dir={tmp_path}/run", *arguments]
    return refused(capfd, monkeypatch, *command)


def test_a_master_port_that_is_taken(capfd, monkeypatch, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refused_as(capfd, monkeypatch, tmp_path, MASTER_PORT=str(port))
    assert f"rank 0 cannot open MASTER_PORT={port} on {socket.gethostname()}" in said
    assert "another program has taken it; choose a free one, with --master_port" in said


def test_a_rank_that_does_not_come(capfd, monkeypatch, tmp_path):
    said = refused_as(capfd, monkeypatch, tmp_path, "parallel.timeout=1", WORLD_SIZE="3")
    assert "ranks 1, 2 of 3 did not join within 1 s (parallel.timeout)" in said
    assert "MASTER_ADDR=127.0.0.1, MASTER_PORT=" in said


def test_a_rank_0_that_does_not_come(capfd, monkeypatch, tmp_path):
    said = refused_as(capfd, monkeypatch, tmp_path, "parallel.timeout=1", RANK="1", LOCAL_RANK="1")
    assert f"rank 1 on {socket.gethostname()} did not reach rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT=" in said


def test_a_host_that_does_not_exist(capfd, monkeypatch, tmp_path):
    said = refused_as(capfd, monkeypatch, tmp_path, RANK="1", LOCAL_RANK="1", MASTER_ADDR="no-such-host.invalid")
    assert "rank 1 does not find the host of MASTER_ADDR=no-such-host.invalid" in said


def test_srun_does_not_start_several_whole_runs(tmp_path):
    """Slurm is not installed here: two processes with the variables that a step of srun gives to its tasks."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    command = [sys.executable, "launch/train.py", "+recipe=smoke", f"output_dir={tmp_path}/run"]
    jobs = [Job(command, env=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}) for task in (0, 1)]
    done = [job.finish() for job in jobs]
    assert [one.returncode for one in done] == [2, 2]
    (sentence,) = [line for one in done for line in sentences(one.stderr)]
    assert "srun has started 2 processes" in sentence and "launch/slurm.sh" in sentence
    assert not (tmp_path / "run").exists()
