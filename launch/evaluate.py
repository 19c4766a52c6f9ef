"""Answers under compressed caches: `deepspeed launch/evaluate.py model.name=DIRECTORY [key=value ...]`.

    python launch/evaluate.py model.name=outputs/.../model tasks=[needle,passkey] lengths=[4096,8192]

Runs in one process, or in several under the deepspeed launcher, which share the samples. A stopped evaluation resumes
with the same `output_dir`. Every key: `conf/evaluate.yaml`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import launch.cli.interrupts
import launch.cli.no_gc  # noqa: F401
from launch.cli.command import leave, run_command
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.evaluate.run import evaluate
from recipes.samples import Samples
from recipes.scoring import score


def action(config: EvaluateConfig) -> bool:
    evaluate(config, Samples, score)
    return True


if __name__ == "__main__":
    leave(run_command(action, "evaluate", EvaluateConfig))
