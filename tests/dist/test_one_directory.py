"""Random sequences of starts, kills, restarts and second starts in one directory.

Nothing of the user's is lost, there are never two runs in the directory, and no process is left behind.
"""

import random
import signal
import sys
import time

import psutil
import pytest

from lrsa_ds.directories.layout import MARK
from lrsa_ds.directories.lock import check_lock
from lrsa_ds.errors import LRSAError
from tests.dist.launcher import PATIENCE, Job, last_step, launch_command, processes_of, rows_of
from tests.dist.test_directory import FOREIGN, put, tree

pytestmark = pytest.mark.dist

NUM_STEPS = 60
SETTINGS = [
    *["+recipe=smoke", f"optim.num_steps={NUM_STEPS}", "seq_len=512", "data.context_length=256"],
    *["eval.before=false", "eval.after=false", "eval.num_examples=1", "log.wandb=disabled"],
    *["checkpoint.every=3", "checkpoint.keep=2", "attention.lag_size=32"],
]
SETTLED_SECONDS = 100  # until no process of an ended job is left


class Story:
    """One directory, and what happens there."""

    def __init__(self, output, draw: random.Random):
        self.output, self.draw = output, draw
        self.events: list[str] = []
        self.foreign: dict = {}

    def start(self, overwrite: bool = False) -> Job:
        command = [*SETTINGS, f"output_dir={self.output}", f"checkpoint.overwrite={str(overwrite).lower()}"]
        num_ranks = self.draw.choice([1, 1, 2])
        self.events.append(f"start of {num_ranks}{', overwriting' if overwrite else ''}")
        if num_ranks == 2:
            return Job(launch_command(*command, "optim.grad_accum=1"))
        return Job([sys.executable, "launch/train.py", *command, "optim.grad_accum=2"])

    def wait(self, job: Job) -> None:
        """Until a moment that was drawn, or the end of the job."""
        step, seconds = self.draw.randrange(NUM_STEPS), 8 * self.draw.random()
        partial, started = self.output / "checkpoints", time.monotonic()
        name, has_come = self.draw.choice(
            [
                (f"{seconds:.1f} s", lambda: time.monotonic() - started > seconds),
                ("the lock", (self.output / "run.lock").exists),
                (f"step {step}", lambda: last_step(self.output) >= step),
                ("a checkpoint", lambda: any(partial.glob("*.partial"))),
            ]
        )
        self.events.append(f"at {name}")
        deadline = time.monotonic() + PATIENCE
        while job.process.poll() is None and not has_come():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.005)

    def put_foreign(self, job: Job) -> None:
        """The user's own things, as soon as the directory is marked."""
        while not self.foreign and job.process.poll() is None:
            if (self.output / MARK).exists():
                put(self.output, *FOREIGN)
                self.foreign = {name: f"of the user: {name}".encode() for name in FOREIGN}
            time.sleep(0.01)

    def sessions(self) -> int:
        """How often a run has begun in the directory."""
        log = self.output / "console.log"
        return log.read_text().count("--- 20") if log.exists() else 0

    def second_start(self, first: Job) -> None:
        """While another run is there: it is refused, and changes nothing."""
        while not self.is_held() and first.process.poll() is None:
            time.sleep(0.005)
        stopped = self.suspend(first)
        if not stopped:
            return
        before, overwrite = tree(self.output), self.draw.random() < 0.5
        done = self.start(overwrite).finish()
        self.events.append(f"second start: {done.returncode}")
        assert done.returncode == 2, done.stderr
        assert "is in use by a run on host" in done.stderr and "Traceback" not in done.stderr
        assert tree(self.output) == before
        for process in stopped:
            process.resume()

    def is_held(self) -> bool:
        """Whether the lock is that of a process which lives: one of a job that was killed may still lie there."""
        try:
            check_lock(self.output)
        except LRSAError:
            return True
        return False

    def suspend(self, job: Job) -> list[psutil.Process]:
        """Stands the job still, so that the other one meets it as it is; nothing if it has ended."""
        found = [psutil.Process(pid) for pid in processes_of(self.output)]
        for process in found:
            process.suspend()
        alive = job.process.poll() is None and self.is_held()
        for process in found if not alive else ():
            process.resume()
        return found if alive else []

    def kill(self, job: Job) -> None:
        """Kills or stops a part of the job or all of it; the whole is gone soon after."""
        everyone = [psutil.Process(pid) for pid in processes_of(self.output)]
        how = self.draw.choice(["one", "all", "launcher", "terminate"])
        self.events.append(f"kill {how}")
        if how == "one" and everyone:
            self.draw.choice(everyone).kill()
        elif how == "all" and job.process.poll() is None:
            job.signal_all(signal.SIGKILL)
        elif how == "launcher":
            job.process.kill()
        elif job.process.poll() is None:
            job.signal_all(signal.SIGTERM)

    def settle(self) -> None:
        deadline = time.monotonic() + SETTLED_SECONDS
        while processes_of(self.output) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(self.output) == []

    def check(self) -> None:
        now = tree(self.output) if self.output.exists() else {}
        lost = [name for name, content in self.foreign.items() if now.get(name) != content]
        assert not lost, lost
        if (self.output / "metrics.jsonl").exists():
            steps = [row["step"] for row in rows_of(self.output, "train")]
            assert steps == list(range(1, len(steps) + 1))

    def act(self) -> None:
        """A start, perhaps others beside it, and its end."""
        begun = self.sessions()
        job = self.start(overwrite=(self.output / "COMPLETED").exists() or self.draw.random() < 0.2)
        self.put_foreign(job)
        self.wait(job)
        if self.draw.random() < 0.4:
            self.second_start(job)
        if self.draw.random() < 0.8:
            self.kill(job)
        done = job.finish()
        self.events.append(f"ended with {done.returncode}")
        self.settle()
        assert self.sessions() <= begun + 1
        self.check()

    def act_at_once(self) -> None:
        """Two starts at the same moment: at most one of them runs at a time, and the other one says why it does not."""
        begun, jobs = self.sessions(), [self.start(), self.start()]
        done = [job.finish() for job in jobs]
        self.events.append(f"ended with {[d.returncode for d in done]}")
        refused = [d for d in done if "is in use by a run on host" in d.stderr or "holds a finished run" in d.stderr]
        assert len(refused) >= 1 and all(d.returncode == 2 for d in refused)
        assert self.sessions() <= begun + 1
        self.settle()
        self.check()


def seeds(count: int):
    slow = [pytest.mark.slow, pytest.mark.timeout(900)]
    return [*range(2), *(pytest.param(seed, marks=slow) for seed in range(2, count))]


@pytest.mark.parametrize("seed", seeds(50))
def test_a_random_sequence(tmp_path, seed):
    draw = random.Random(seed)
    story = Story(tmp_path / "run", draw)
    try:
        story.act()
        story.act_at_once() if draw.random() < 0.2 else story.act()
    except BaseException as error:
        error.add_note(f"seed {seed}: {'; '.join(story.events)}")
        raise
    finally:
        for pid in processes_of(story.output):
            psutil.Process(pid).kill()
    print(f"seed {seed}: {'; '.join(story.events)}")
