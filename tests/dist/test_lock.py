"""The lock of an output directory, between real processes."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from lrsa_ds.directories.lock import LOCK, Held, Process, check_lock, this_process
from lrsa_ds.errors import LRSAError
from tests.dist.launcher import ENV
from tests.helpers import ROOT

pytestmark = pytest.mark.dist
NUM_WORKERS = 3


class Worker:
    """A process of its own that takes locks as it is told."""

    def __init__(self):
        command = [sys.executable, str(ROOT / "tests/dist/lock_worker.py")]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=ENV | {"PYTHONPATH": str(ROOT)}, text=True, **pipes)

    def say(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().strip()

    def take(self, directory, moment=0.0):
        self.say(f"take {moment} {directory}")

    def give(self):
        self.say("give")
        assert self.hear() == "given"


@pytest.fixture(scope="module")
def pool():
    found: list[Worker] = []
    yield found
    for worker in found:
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def workers(pool):
    """They take seconds to start, so those that a test has left alive serve the next one."""
    pool[:] = [worker for worker in pool if worker.process.poll() is None]
    new = [Worker() for _ in range(NUM_WORKERS - len(pool))]
    assert all(worker.hear() == "ready" for worker in new)
    pool.extend(new)
    return list(pool)


def take_at_once(workers, directory):
    """All try at the same moment; returns the worker that has the lock now."""
    moment = time.monotonic() + 0.3
    for worker in workers:
        worker.take(directory, moment)
    heard = [worker.hear() for worker in workers]
    assert heard.count("held") == 1, heard
    winner = workers[heard.index("held")]
    for line in set(heard) - {"held"}:
        assert line.startswith("refused: output_dir=") and f", process {winner.process.pid}, since " in line
    return winner


def dead_process():
    """One that has ended."""
    child = subprocess.Popen(["sleep", "60"])
    known = replace(this_process(), pid=child.pid)
    child.kill()
    child.wait()
    return known


def write_lock(directory, *processes, token="abc"):
    (directory / LOCK).write_text(Held(token, "yesterday", list(processes)).text())


def test_of_all_that_start_at_once_one_wins(workers, tmp_path):
    for _ in range(5):
        winner = take_at_once(workers, tmp_path)
        with pytest.raises(LRSAError, match=f"is in use by a run on host .*, process {winner.process.pid}, since 20"):
            check_lock(tmp_path)
        winner.give()
        assert list(tmp_path.iterdir()) == []
        check_lock(tmp_path)


def test_the_lock_of_a_dead_process_goes_to_one_of_those_that_find_it(workers, tmp_path):
    reused = replace(this_process(), started=1)  # the number is that of a process which lives, but started later
    for stale in ([dead_process()], [reused], [dead_process(), reused]):
        write_lock(tmp_path, *stale)
        check_lock(tmp_path)
        # One that died while it took the place of the dead one, and left its claim.
        (tmp_path / f"{LOCK}.abc").write_text(Held("def", "yesterday", [dead_process()]).text())
        winner = take_at_once(workers, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        winner.give()


def test_a_killed_holder_does_not_block_and_its_surviving_ranks_do(workers, tmp_path):
    first = take_at_once(workers, tmp_path)
    held = json.loads((tmp_path / LOCK).read_text())
    first.process.kill()
    first.process.wait()
    others = [worker for worker in workers if worker is not first]
    neighbour = others.pop()
    # Rank 0 of that run is dead, and another rank still lives.
    neighbour.take(tmp_path)
    assert neighbour.hear() == "held"
    alive = Process(**json.loads((tmp_path / LOCK).read_text())["processes"][0])
    neighbour.give()
    write_lock(tmp_path, Process(**held["processes"][0]), alive)
    others[0].take(tmp_path)
    assert f"process {alive.pid}, since yesterday" in others[0].hear()
    neighbour.process.kill()
    neighbour.process.wait()
    others[0].take(tmp_path)
    assert others[0].hear() == "held"
    others[0].give()


def test_a_holder_on_another_machine_is_known_by_its_beat(workers, tmp_path):
    """What another machine would see: the file says so here, and its holder renews it all the same."""
    first = take_at_once(workers, tmp_path)
    second = next(worker for worker in workers if worker is not first)
    held = json.loads((tmp_path / LOCK).read_text())
    held["processes"][0] |= {"machine": "another", "host": "far"}
    (tmp_path / LOCK).write_text(json.dumps(held))
    check_lock(tmp_path)  # it cannot be known at a glance
    second.take(tmp_path)
    assert f"in use by a run on host far, process {first.process.pid}, since 20" in second.hear()
    # Without a beat it counts as dead; if it only slept, it ends as soon as it wakes.
    first.process.send_signal(signal.SIGSTOP)
    second.take(tmp_path)
    assert second.hear() == "held"
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(timeout=60) == 3
    assert "another run has taken" in first.process.stderr.read()
    second.give()


def test_a_lock_that_was_cut_short_or_removed_by_hand(workers, tmp_path):
    (tmp_path / LOCK).write_text("{")
    workers[0].take(tmp_path)
    assert workers[0].hear() == "held"
    (tmp_path / LOCK).unlink()
    deadline = time.monotonic() + 60
    while not (tmp_path / LOCK).exists() and time.monotonic() < deadline:  # its holder makes it anew
        time.sleep(0.05)
    workers[1].take(tmp_path)
    assert f"process {workers[0].process.pid}" in workers[1].hear()
    workers[0].give()


def test_a_directory_that_cannot_be_written(workers, tmp_path):
    workers[0].take(tmp_path / "no" / "such")
    assert "no/such cannot be locked: No such file" in workers[0].hear()


def test_processes_are_told_apart():
    here = this_process()
    assert here.is_here and here.is_alive
    assert not replace(here, started=here.started + 1).is_alive
    assert not replace(here, machine="another").is_here
    assert not dead_process().is_alive
    assert Process(**asdict(here)) == here
