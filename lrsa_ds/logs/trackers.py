"""Which services follow a run: W&B, and TensorBoard and MLflow where they are asked for."""

from collections.abc import Callable
from pathlib import Path

from lrsa_ds.errors import Problems
from lrsa_ds.logs.mlflow import MLflow, check_mlflow
from lrsa_ds.logs.tensorboard import TensorBoard, check_tensorboard
from lrsa_ds.logs.tracker import Identity, Tracker
from lrsa_ds.logs.wandb_thread import WandbThread, check_wandb
from lrsa_ds.settings.run import LogConfig


def check_trackers(log: LogConfig) -> None:
    """Raises LRSAError if a service that `log` asks for cannot be had; needs no network."""
    problems = Problems()
    checks = [(True, lambda: check_wandb(log)), (log.tensorboard, check_tensorboard), (log.mlflow, check_mlflow)]
    for is_wanted, check in checks:
        if is_wanted:
            with problems.collect():
                check()
    problems.raise_all()


def start_trackers(log: LogConfig, output_dir: Path, identity: Identity, say: Callable[[str], None]) -> list[Tracker]:
    """The services that follow the run, each in a thread that has begun."""
    mode = check_wandb(log)
    trackers: list[Tracker] = []
    if mode != "disabled":
        trackers.append(WandbThread(mode, output_dir, identity, say))
    trackers += [TensorBoard(output_dir, identity, say)] if log.tensorboard else []
    trackers += [MLflow(output_dir, identity, say)] if log.mlflow else []
    for tracker in trackers:
        tracker.start()
    return trackers
