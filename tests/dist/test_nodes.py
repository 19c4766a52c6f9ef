"""Several nodes, as far as one machine has them: two node ranks of the deepspeed launcher, and the Slurm script."""

import os
import signal
import stat
import sys

import pytest

from tests.dist import launcher
from tests.dist.launcher import Job, last_step, rows_of, run
from tests.helpers import ROOT, free_port

pytestmark = pytest.mark.dist
SHORT = ["+recipe=smoke", "log.wandb=disabled", "eval.before=false", "eval.after=false", "optim.warmup_steps=1"]

# What Slurm's srun does for the script: so many processes, each of which knows its number. Slurm itself is not here.
SRUN = """#!/usr/bin/env bash
shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE='2(x1)' "$@" &
done
code=0
for job in $(jobs -p); do
    wait $job
    last=$?
    [ $last -gt $code ] && code=$last
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "$(dirname "$0")/requeued"; fi
"""


def test_two_node_ranks_of_the_launcher(tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port, output = str(free_port()), tmp_path / "run"
    command = ["deepspeed", "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    training = ["launch/train.py", *SHORT, "optim.num_steps=2", f"output_dir={output}"]
    jobs = [Job([*command, "--node_rank", str(node), *training]) for node in (0, 1)]
    for done in [job.finish() for job in jobs]:
        assert done.returncode == 0, done.stderr
    assert (output / "COMPLETED").exists() and len(rows_of(output, "train")) == 2


def test_the_slurm_script_goes_on_after_its_time_is_up(tmp_path, monkeypatch):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    slurm = {
        "PATH": os.pathsep.join([str(tmp_path), launcher.ENV["PATH"]]),
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": str(free_port()),
    }
    monkeypatch.setattr(launcher, "ENV", launcher.ENV | slurm)
    output = tmp_path / "run"
    command = ["bash", str(ROOT / "launch/slurm.sh"), *SHORT, "optim.num_steps=20", f"output_dir={output}"]
    job = Job(command)
    job.wait_for(lambda: last_step(output) >= 2)
    for process in job.processes("launch/train.py"):
        process.send_signal(signal.SIGUSR1)
    done = job.finish()
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows_of(output, "train")] == list(range(1, 21))
