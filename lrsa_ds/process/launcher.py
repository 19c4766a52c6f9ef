"""Who has started this process: read off the environment, checked, and watched in the process table."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from lrsa_ds.errors import LRSAError

# What torchrun and the deepspeed launcher tell each rank.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OF_A_RANK = VARIABLES[:3]
# What starts several processes without these: the variable that counts them, and the one that numbers this process.
# A Slurm batch script sets SLURM_NTASKS for its whole allocation, and is one process: only a step of srun counts tasks.
UNSUITED = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun of Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun of MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "mpirun of MPICH or Intel MPI": ("PMI_SIZE", "PMI_RANK"),
}
# Words among the first of a command line that make it a launcher's.
LAUNCHERS = {
    *("deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("slurmstepd", "mpirun", "mpiexec", "orterun", "orted", "prted", "hydra_pmi_proxy"),
}


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher, suited or not, has started other processes beside this one."""
    if "RANK" in environment:
        return environment.get("WORLD_SIZE") != "1"
    return _unsuited(environment) is not None


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raises LRSAError unless the environment is that of one process, or of one rank that knows its place."""
    present = [name for name in OF_A_RANK if name in environment]
    starter = None if "RANK" in environment else _unsuited(environment)
    if starter is not None:
        raise LRSAError(
            f"{starter} has started {environment[UNSUITED[starter][0]]} processes, which do not know of each other and "
            f"would each be a whole run: set {', '.join(VARIABLES)} for each of them, as launch/slurm.sh does, or "
            "start one process a node with torchrun or the deepspeed launcher."
        )
    if not present:
        return
    absent = [name for name in VARIABLES if name not in environment]
    if absent:
        verb, other = ("is" if len(present) == 1 else "are"), ("is" if len(absent) == 1 else "are")
        raise LRSAError(
            f"{', '.join(present)} {verb} set and {', '.join(absent)} {other} not: a rank needs all of them, which "
            f"torchrun and the deepspeed launcher set; for a run of one process unset {', '.join(present)}."
        )
    size = _whole(environment, "WORLD_SIZE", 1, None)
    _whole(environment, "RANK", 0, size - 1)
    _whole(environment, "LOCAL_RANK", 0, size - 1)
    _whole(environment, "MASTER_PORT", 1, 65535)


def _unsuited(environment: Mapping[str, str]) -> str | None:
    for starter, (count, number) in UNSUITED.items():
        if number in environment and environment.get(count, "").isdecimal() and int(environment[count]) > 1:
            return starter
    return None


def _whole(environment: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    text = environment[name]
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        valid = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise LRSAError(f"{name}={text!r} in the environment is not valid: give a whole number {valid}.")
    return number


def named(ranks: Sequence[int]) -> str:
    """Such as "rank 3" or "ranks 0, 2"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


class Launcher:
    """The launchers above this process and the ranks beside it on this host."""

    def __init__(self) -> None:
        self._above: list[psutil.Process] = []
        parents = psutil.Process().parents()
        for process in parents:
            if not _is_launcher(process):
                break
            self._above.append(process)
        self._is_orphan = any(_takes_orphans(process) for process in parents[: _levels()])
        self._beside: dict[int, psutil.Process] = {}

    def is_gone(self) -> bool:
        """Whether a launcher that has started this process runs no longer. A shell may exit unnoticed."""
        return self._is_orphan or not all(_is_alive(process) for process in self._above)

    def missing(self) -> list[int]:
        """The ranks of this host that have ended, as far as their launcher is known."""
        if not self._above:
            return []
        expected = self._beside.keys()
        if _is_alive(self._above[0]):
            self._beside |= _ranks_below(self._above[0])
            first = int(os.environ.get("RANK", 0)) - int(os.environ.get("LOCAL_RANK", 0))
            expected = range(first, first + ranks_of_host())
        return [rank for rank in expected if rank not in self._beside or not _is_alive(self._beside[rank])]


def ranks_of_host(otherwise: int = 1) -> int:
    """Ranks on this host, as the deepspeed launcher or torchrun says it; `otherwise` where neither does."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", otherwise)))


def _levels() -> int:
    """How many launchers are above this process for certain, by what they set."""
    if os.environ.get("CROSS_SIZE") == "1":  # deepspeed's, on one node: one that starts the ranks, and one above it
        return 2
    return int("CROSS_SIZE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ)


def _takes_orphans(process: psutil.Process) -> bool:
    """Whether this is where a process goes whose parent has ended; a launcher may be a container's first process."""
    try:
        return (process.pid == 1 or process.name() == "systemd") and not _is_launcher(process)
    except psutil.Error:
        return False


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = [os.path.basename(word) for word in process.cmdline()[:4]]
    except psutil.Error:
        return False
    named = words[:1] if words and not words[0].startswith("python") else words
    return not LAUNCHERS.isdisjoint(named)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _ranks_below(launcher: psutil.Process) -> dict[int, psutil.Process]:
    found = {}
    with suppress(psutil.Error):
        for child in launcher.children():
            with suppress(psutil.Error, KeyError, ValueError):  # one that has ended meanwhile has no environment
                found[int(child.environ()["RANK"])] = child
    return found
