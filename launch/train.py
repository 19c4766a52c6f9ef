"""Post-training with LRSA: `deepspeed launch/train.py +recipe=qa_128k [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import launch.cli.interrupts
import launch.cli.no_gc  # noqa: F401
import recipes
from launch.cli.accelerator import PICKS
from launch.cli.command import leave, run_command
from lrsa_ds.config import TrainConfig
from lrsa_ds.train.run import train


def action(config: TrainConfig) -> bool:
    train(config, recipes.load_procedure(config.procedure), list(PICKS.values()))
    return True


if __name__ == "__main__":
    leave(run_command(action))
