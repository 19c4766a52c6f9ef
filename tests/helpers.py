"""What several tests need: comparing tensors, and running a script in several processes."""

import json
import math
import os
import random
import socket
import struct
from contextlib import suppress
from pathlib import Path

import torch

from tests.forked import run_forked

ROOT = Path(__file__).resolve().parent.parent
PORTS = range(20_000, 32_000)  # below those that systems give to sockets which ask for any


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of `expected`, in fp64. NaN on either side gives infinity: it passes no bound."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference = (actual - expected).norm().item()
    if difference == 0:
        return 0.0
    scale = expected.norm().item()
    error = difference / scale if scale > 0 else math.inf
    return math.inf if math.isnan(error) else error


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "tensor") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} is above {tolerance:.0e}"


def write_rows(path: Path, rows) -> str:
    """Writes rows as JSON lines; returns the path as settings take it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def example(heading: str) -> str:
    """The code of the first Python example below a heading of docs/extending.md."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return page.split(f"\n## {heading}\n")[1].split("```python\n")[1].split("```")[0]


def all_examples(data, epoch: int = 0) -> list:
    """The examples of every training row of an epoch."""
    return [example for examples in data.examples_of_rows(epoch) for example in examples]


def free_port() -> int:
    """A port of this machine for a process that opens it seconds later.

    Until then no other process is given it: not as any port, since it is below those, and not by a test that runs
    beside this one, since workers of pytest-xdist draw from ports of their own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = PORTS[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    while True:
        port = random.SystemRandom().choice(mine)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """The environment of each rank on this machine, as a launcher would set it."""
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_ranks(script, world_size: int, *args, timeout: float = 400) -> list[str]:
    """Runs `python script *args` once per rank, as a launcher would, and returns what each rank wrote to stdout.

    A rank that fails, or the timeout in seconds, ends all of them and raises with the end of their output.
    """
    ranks = [([*map(str, args)], environment) for environment in rank_environments(world_size)]
    done = run_forked(str(script), ranks, Path.cwd(), timeout)
    if any(rank.returncode for rank in done):
        tails = [
            f"--- rank {rank}, exit code {one.returncode}\n{one.stdout[-1000:]}{one.stderr[-3000:]}"
            for rank, one in enumerate(done)
        ]
        raise RuntimeError(f"{Path(script).name} failed\n" + "\n".join(tails))
    return [rank.stdout for rank in done]


def metrics_of(output_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; NaN and infinity, which are not JSON, are an error."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse_constant) for line in lines]


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def wandb_records(output_dir):
    """The records of the one W&B run below `output_dir`: a LevelDB log of 32 KiB blocks, after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = output_dir.glob("wandb/*run-*/*.wandb")
    data, position, payload, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(payload))
            payload = b""
    return records


def wandb_history(records):
    items = [record.history.item for record in records if record.HasField("history")]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in items]
