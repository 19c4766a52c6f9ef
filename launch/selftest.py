"""Checks that sequence parallelism does not change your training, with your own model, data and settings.

    deepspeed --num_gpus 2 launch/selftest.py +recipe=smoke parallel.sp_size=2 [key=value ...]

Trains two steps with `parallel.sp_size` and two without, on the same sequences, and prints both side by side. Without
it every rank holds complete sequences: choose a `seq_len` that fits. `model.dtype=fp32` makes the comparison sharper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import launch.cli.interrupts
import launch.cli.no_gc  # noqa: F401
import recipes
from launch.cli.command import leave, run_command
from lrsa_ds.config import TrainConfig
from lrsa_ds.train.selftest import selftest


def action(config: TrainConfig) -> bool:
    return selftest(config, recipes.load_procedure(config.procedure))


if __name__ == "__main__":
    leave(run_command(action))
