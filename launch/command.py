"""What every command does: compose the configuration, type it, act, and say errors in one sentence."""

import atexit
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch.accelerator import register_resolver
from launch.checkout import CONF, check_fetched, register_checkout
from launch.schema import register_schema
from launch.sentences import hydra_sentence
from lrsa_ds.config import TrainConfig, typed_config
from lrsa_ds.errors import LRSAError, Stopped
from lrsa_ds.parallel.mesh import local_rank, rank

STOPPED, LOST = 75, 4


def leave(code: int) -> None:
    """Ends this process at once, after what is registered for its exit.

    In the interpreter's own last steps a thread of a library can still abort a process whose work is done, and the
    launcher would take a finished run for a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed since a process at the other end is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def run_command(action: Callable[[Any], bool], name: str = "train", schema: type = TrainConfig) -> int:
    """Runs `action` on what `conf/<name>.yaml` and the command line compose, as an instance of `schema`.

    Returns:
        The exit code: 0 if `action` returned true, 1 if not, 2 after an error that the user can mend, and 75 (try
        again, in the words of sysexits.h) if a signal has stopped the run and the same command would go on; 4 if
        another rank has ended.
    """
    if not gc.isenabled():  # see no_gc.py
        gc.enable()
        gc.freeze()  # what was imported stays: no collection has to look at it
    # The deepspeed launcher appends --local_rank=N, which Hydra would refuse; the environment says the same.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    if {"-m", "--multirun"} & set(sys.argv):
        if local_rank() == 0:
            print("error: a sweep has a command of its own: python launch/sweep.py --multirun ...", file=sys.stderr)
        return 2
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, and leave as one sentence
    register_resolver()
    register_checkout()
    register_schema(name, schema)
    succeeded, failure = False, None

    def task(composed: DictConfig) -> None:
        nonlocal succeeded, failure
        try:
            config = typed_config(composed, schema)
            check_fetched(config.model)
            succeeded = action(config)
        except (LRSAError, Stopped) as error:  # on its way through Hydra it would print the overrides on every rank
            failure = error

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
        if failure is not None:
            raise failure
    except Stopped as stopped:
        if local_rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        return STOPPED
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        print(f"error: rank {rank()} lost another rank of the run, which ended first.", file=sys.stderr, flush=True)
        return LOST
    except (LRSAError, HydraException, OmegaConfBaseException) as error:
        if local_rank() == 0:
            print(f"error: {hydra_sentence(error, schema)}", file=sys.stderr, flush=True)
        return 2
    return 0 if succeeded else 1
