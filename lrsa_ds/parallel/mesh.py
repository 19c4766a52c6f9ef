"""The ranks of a run: their groups, their devices, and the few collectives that the trainer needs."""

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lrsa_ds.attention.kernels.blocks import BLOCK
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.parallel.lean_deepspeed import deepspeed
from lrsa_ds.parallel.rendezvous import free_port, meet
from lrsa_ds.parallel.sequence.all_to_all import SequenceGroup
from lrsa_ds.process.launcher import ranks_of_host
from lrsa_ds.registry import EXCHANGES

JOIN = timedelta(minutes=30)  # time for all ranks to start, if no setting gives it


@dataclass(frozen=True)
class Mesh:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence: SequenceGroup | None = None  # the ranks that share this rank's sequences, if there are several

    @property
    def sp_size(self) -> int:
        """Ranks that share a sequence."""
        return self.sequence.size if self.sequence else 1

    @property
    def sp_rank(self) -> int:
        """This rank's place among those that share its sequences."""
        return self.rank % self.sp_size

    @property
    def row_multiple(self) -> int:
        """The number of tokens of a row must be a multiple of this: ranks share it evenly, GPUs in whole blocks."""
        if self.sequence is None:
            return 1
        stretches = self.sp_size * self.sequence.strategy.num_stretches
        return stretches * (BLOCK if self.device.type == "cuda" else 1)

    def local_tokens(self, num_tokens: int) -> tuple[slice, ...]:
        """The tokens of a row that this rank holds; `row_multiple` divides their number."""
        if self.sequence is None:
            return (slice(0, num_tokens),)
        return self.sequence.strategy.local_tokens(num_tokens, self.sp_size, self.sp_rank)

    @property
    def dp_size(self) -> int:
        """Replicas: groups of ranks with different sequences."""
        return self.world_size // self.sp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def sum(self, values: list[float]) -> list[float]:
        """The sum over ranks of each value, in fp64, on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """The maximum over ranks of each value, on every rank."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum_in_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks that share this rank's sequences, without gradients."""
        if self.sequence is None:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total, group=self.sequence.process_group)
        return total

    def _reduce(self, values: list[float], operation) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def from_main(self, value: Any) -> Any:
        """The value that rank 0 holds, on every rank."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on every rank.

        Raises:
            LRSAError: on every rank, what `action` has raised.
        """
        value = problem = None
        if self.is_main:
            try:
                value = action()
            except LRSAError as error:
                problem = str(error)
        value, problem = self.from_main((value, problem))
        if problem is not None:
            raise LRSAError(problem)
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Processes of the run, known from the launcher before the process group starts."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_world(sp_size: int, count: int | None = None) -> None:
    """Raises LRSAError unless `count` processes, or those of the run, can be divided into groups of `sp_size`."""
    count = world_size() if count is None else count
    valid = ", ".join(str(p) for p in range(1, count + 1) if count % p == 0)
    require(
        count % sp_size == 0,
        f"parallel.sp_size={sp_size} does not divide the {count} processes of the run; valid here: {valid}.",
    )


def start_mesh(
    sp_size: int = 1, timeout: timedelta | None = None, exchange: str = "gather_kept", join: timedelta = JOIN
) -> Mesh:
    """Starts the process group: NCCL on CUDA, gloo on the CPU. Without a launcher the run has one process.

    Each `sp_size` consecutive ranks share their sequences, in the way that `exchange` names (see `strategies.py`). A
    collective may take as long as `timeout`, or else as torch.distributed sets it; the ranks meet within `join`.

    Raises:
        LRSAError: the master port is taken, a rank does not come, or there is no GPU for this one.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    # DeepSpeed 0.19 calls collectives by names that newer torch releases warn about, at every call site.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if use_cuda else torch.device("cpu")
    if use_cuda:
        count = torch.cuda.device_count()
        require(
            local_rank() < count,
            f"rank {rank()} (LOCAL_RANK={local_rank()}) has no GPU: {socket.gethostname()} shows {count}, so start at "
            f"most {count} ranks there.",
        )
        torch.cuda.set_device(device)
    else:
        # DeepSpeed would compile a shared-memory collective, for most of a minute, and leave its segments behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _share_cores()
    backend = "nccl" if use_cuda else "gloo"
    patience: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if not dist.is_initialized():  # another mesh of the same processes takes the group of the first
        dist.init_process_group(backend, store=meet(join), rank=rank(), world_size=world_size(), **patience)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, **patience)  # it takes what torch has started
    return Mesh(dist.get_rank(), dist.get_world_size(), local_rank(), device, _sequence_group(sp_size, exchange))


def _share_cores() -> None:
    """Each rank of a machine uses its share of the cores, unless the environment sets the number of threads.

    With as many threads as cores in every rank, each operation on the CPU would wait for threads of the other ranks.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_of_host()))


def _sequence_group(size: int, exchange: str) -> SequenceGroup | None:
    strategy = EXCHANGES[exchange]
    if size == 1:
        return None
    # Every rank takes part in making every group.
    groups = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    mine = groups[dist.get_rank() // size]
    assert isinstance(mine, dist.ProcessGroup)  # as for every group that this rank belongs to
    return SequenceGroup(mine, size, dist.get_rank() % size, strategy)


def stop_mesh() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
