"""Commands as users start them, in real processes that a test can wait for, signal and kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.forked import Forked, run_forked
from tests.helpers import ROOT, free_port, metrics_of, rank_environments

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}
WITHOUT_MLFLOW = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/dist/without_mlflow"), *filter(None, [ENV.get("PYTHONPATH")])])
}


PATIENCE = 400  # seconds for what takes a tenth of that on an idle machine


class Job:
    """A command in a session of its own; without MLflow unless `env` says where it is."""

    def __init__(self, command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None):
        self.command = command
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=ENV | WITHOUT_MLFLOW | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
        """Waits for its end; nothing survives the timeout."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.signal_all(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(self.command, self.process.returncode, out, err)

    def signal_all(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in their order."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            command = command_of(process)
            arguments = [a for a in command if a.startswith("--local_rank=")]
            if arguments and "deepspeed.launcher.launch" not in command:
                found.setdefault(int(arguments[0].split("=")[1]), process)
        return [found[rank] for rank in sorted(found)]

    def processes(self, script: str) -> list[psutil.Process]:
        """All that run a script, without the shells and launchers around them."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in everyone if script in command_of(p)[1:3] and "python" in p.name()]

    def wait_for(self, condition, timeout: float = PATIENCE) -> None:
        """Until `condition()` holds; the job must not end before."""
        if not comes_true(condition, lambda: self.process.poll() is not None, timeout):
            self.signal_all(signal.SIGKILL) if self.process.poll() is None else None
            done = self.finish()
            raise AssertionError(f"it did not come to that: {done.returncode}\n{done.stdout}\n{done.stderr}")


def comes_true(condition, has_ended, timeout: float = PATIENCE) -> bool:
    """Waits until `condition()` holds, and whether it does before `has_ended()` or the timeout in seconds."""
    deadline, asked = time.monotonic() + timeout, time.monotonic()
    while not condition():
        answered = time.monotonic()
        if has_ended() or answered > deadline:
            return False
        time.sleep(min(0.02, max(0.002, 4 * (answered - asked))))  # asking takes time from what it waits for
        asked = time.monotonic()
    return True


def command_of(process: psutil.Process) -> list[str]:
    """What started a process; empty for one that has ended meanwhile."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def run(
    command: list[str], timeout: float = PATIENCE, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    return Job(command, cwd, env).finish(timeout)


def launch_command(*arguments: str) -> list[str]:
    port = ["--master_port", str(free_port())]
    return ["deepspeed", "--num_accelerators", "2", *port, "launch/train.py", *arguments]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """A training run under the deepspeed launcher as users start it, with all that is installed."""
    return run(launch_command(*arguments), env={"PYTHONPATH": ENV.get("PYTHONPATH", "")})


def torchrun_command(*arguments: str, num_ranks: int = 2) -> list[str]:
    where = ["--nproc_per_node", str(num_ranks), "--master_port", str(free_port())]
    return ["torchrun", *where, "launch/train.py", *arguments]


def sentences(stderr: str) -> list[str]:
    """What ranks have said: the lines that begin with "error: "."""
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def run_alone(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """A command without a launcher: one process."""
    return run_forked(f"launch/{script}.py", [(list(arguments), ENV)], ROOT, PATIENCE)[0]


def train_alone(*arguments: str) -> subprocess.CompletedProcess:
    return run_alone("train", *arguments)


def start_as_ranks(*arguments: str, script: str = "train", num_ranks: int = 2, cwd: Path = ROOT) -> Forked:
    """Starts a command on several ranks, with what the deepspeed launcher gives to each, but without its own start."""
    environments = [environment | ENV for environment in rank_environments(num_ranks)]
    ranks = [([f"--local_rank={rank}", *arguments], environment) for rank, environment in enumerate(environments)]
    return Forked(str(ROOT / f"launch/{script}.py"), ranks, cwd)


def run_as_ranks(*arguments: str, **how) -> subprocess.CompletedProcess:
    """What a command started so leaves behind: the first exit code that is not 0, and the outputs of all ranks."""
    done = start_as_ranks(*arguments, **how).finish(PATIENCE)
    code = next((rank.returncode for rank in done if rank.returncode), 0)
    stdout, stderr = ("".join(texts) for texts in zip(*((rank.stdout, rank.stderr) for rank in done)))
    return subprocess.CompletedProcess(list(arguments), code, stdout, stderr)


def rows_of(output: Path, kind: str) -> list[dict]:
    return [row for row in metrics_of(output) if row["kind"] == kind]


def last_step(output: Path) -> int:
    """The step that a running job has logged last; 0 before the first."""
    try:
        return rows_of(output, "train")[-1]["step"]
    except (OSError, ValueError, IndexError):
        return 0


def processes_of(output: Path) -> list[int]:
    """Processes on this machine whose command names the directory."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(output) in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found
