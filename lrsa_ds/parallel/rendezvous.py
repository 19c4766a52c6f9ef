"""The rendezvous of the ranks of a run before their process group starts, and errors if a rank does not come."""

import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from lrsa_ds.errors import LRSAError
from lrsa_ds.process.launcher import named

POLL_SECONDS = 0.5
NOTE_SECONDS = 20.0  # of waiting, before rank 0 prints which ranks are missing
LEAST_SECONDS = 1.0  # minimum timeout of torch's store


def free_port() -> int:
    """A port of this machine that no program has taken yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(patience: timedelta) -> dist.Store:
    """The store of the run, once every rank has come; rank 0 opens the master port.

    Raises:
        LRSAError: the port is taken, the host is unknown, rank 0 cannot be reached, or a rank does not come within
            `patience`.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _open_store(rank, size, max(patience, timedelta(seconds=LEAST_SECONDS)))
    store.set(_key(rank), socket.gethostname())
    _wait_for_all(store, rank, size, patience.total_seconds())
    return store


def _key(rank: int) -> str:
    return f"lrsa/{rank}"


def _open_store(rank: int, size: int, patience: timedelta) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"MASTER_ADDR={host}, MASTER_PORT={port}"
    # Under torchrun its agent has opened the port, and keeps the keys of each attempt apart.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise LRSAError(f"rank {rank} does not find the host of {place} ({error.strerror}): correct it.") from error
    try:
        opens = rank == 0 and not of_agent
        store = dist.TCPStore(host, port, size, opens, patience, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if rank == 0 and not of_agent:
            raise LRSAError(_not_opened(host, port, str(error))) from error
        raise LRSAError(
            f"rank {rank} on {socket.gethostname()} did not reach rank 0 at {place} ({_reason(error)}): it has not "
            "come, another program answers there, or the network lets nothing through."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"/lrsa/attempt_{attempt}", store) if of_agent else store


def _not_opened(host: str, port: int, reason: str) -> str:
    start = f"rank 0 cannot open MASTER_PORT={port} on {socket.gethostname()} (MASTER_ADDR={host})"
    if "EADDRINUSE" in reason:
        return (
            f"{start}: another program has taken it; choose a free one, with --master_port of the deepspeed launcher, "
            "--master-port of torchrun, or the variable."
        )
    return f"{start}: {reason.splitlines()[0].rstrip('.')}."


def _reason(error: Exception) -> str:
    text = str(error)
    return "timed out" if "timed out" in text else text.splitlines()[0][:200].rstrip(".")


def _wait_for_all(store: dist.Store, rank: int, size: int, patience: float) -> None:
    started, noted = time.monotonic(), False
    absent = list(range(size))
    while True:
        absent = [other for other in absent if not store.check([_key(other)])]
        waited = time.monotonic() - started
        if not absent:
            return
        if waited > patience:
            raise LRSAError(
                f"{named(absent)} of {size} did not join within {patience:g} s (parallel.timeout): look for an error "
                f"on {'its' if len(absent) == 1 else 'their'} host, and whether it reaches "
                f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}."
            )
        if rank == 0 and waited > NOTE_SECONDS and not noted:
            noted = True
            print(f"waiting for {named(absent)} of {size} to start", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
