"""What several tests need: comparing tensors, and running a script in several processes."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lrsa_ds.parallel.rendezvous import free_port

ROOT = Path(__file__).resolve().parent.parent


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


def all_examples(data, epoch: int = 0) -> list:
    """The examples of every training row of an epoch."""
    return [example for examples in data.examples_of_rows(epoch) for example in examples]


def run_ranks(script, world_size: int, *args, timeout: float = 240, env: dict | None = None) -> list[str]:
    """Runs `python script *args` once per rank, as a launcher would, and returns what each rank wrote to stdout.

    The first rank that fails, or the timeout in seconds, ends all of them and raises with the end of their output.
    """
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
        **(env or {}),
    }
    command = [sys.executable, str(script), *map(str, args)]
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world_size)]
        try:
            for rank, log in enumerate(logs):
                with open(f"{log}.out", "w") as stdout, open(f"{log}.err", "w") as stderr:
                    # A session of its own makes each rank the leader of a process group, which can be killed whole.
                    process = subprocess.Popen(
                        command,
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                        start_new_session=True,
                    )
                processes.append(process)
            failure = _wait(processes, timeout)
        finally:
            _kill(processes)
        outputs = [Path(f"{log}.out").read_text(errors="replace") for log in logs]
        errors = [Path(f"{log}.err").read_text(errors="replace") for log in logs]
    if failure:
        tails = [
            f"--- rank {rank}, exit code {process.returncode}\n{outputs[rank][-1000:]}{errors[rank][-3000:]}"
            for rank, process in enumerate(processes)
        ]
        raise RuntimeError(f"{Path(script).name}: {failure}\n" + "\n".join(tails))
    return outputs


def _wait(processes, timeout: float) -> str | None:
    """Waits until all have ended well (None), or one has failed or time is up (says which)."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank} failed first, with exit code {code}"
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            return f"ranks {running} still ran after {timeout:g} s"
        time.sleep(0.05)


def _kill(processes) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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
