"""Common to all commands: compose the configuration, type it, act, and report errors in one sentence."""

import atexit
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch.cli.accelerator import PICKS, register_resolver
from launch.cli.checkout import CONF, check_fetched, register_checkout
from launch.cli.defaults import fit_defaults
from launch.cli.mistakes import every_mistake
from launch.cli.plugins import typed_with_plugins
from launch.cli.schema import register_schema
from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError, Stopped
from lrsa_ds.hub import NOT_WRITABLE
from lrsa_ds.parallel.mesh import rank
from lrsa_ds.process.exit_message import report_exit, reported_exit
from lrsa_ds.process.exits import Exit, ignore_ended_children, kill_children
from lrsa_ds.process.launcher import check_launcher

EXIT_MESSAGE_SECONDS = 5.0  # time for another rank to print why it has ended


def leave(code: int) -> None:
    """Ends this process at once, after its registered exit handlers.

    During the shutdown of the interpreter, a thread of a library can still abort a process whose work is done, and the
    launcher would report a finished run as failed.
    """
    ignore_ended_children()
    kill_children()  # otherwise Python would wait for them
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def plain_keys(argument: str) -> str:
    """Removes the quotes of JSON and Python around keys of dictionaries in the value of an override.

    Hydra accepts 'attention.layers={0-1: 1.0}' but not "0-1" with quotes. Keys may contain spaces and commas. A single
    dictionary of layers becomes a list of one: a list replaces the default, while Hydra would merge dictionaries.
    """
    if not re.match(r"[+~]*[\w./@-]+=(\[\s*)?\{", argument):
        return argument
    quoted = r"""([{,]\s*)(["'])([\w. ,-]+)\2(?=\s*:)"""
    argument = re.sub(quoted, lambda found: found[1] + found[3].replace(",", " "), argument)
    return re.sub(r"^(\w+\.layers=)(\{.*\})$", r"\1[\2]", argument.strip()).replace("=[{}]", "=[]")


def _lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because a process at the other end is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def run_command(
    action: Callable[[Any], bool], name: str = "train", schema: type = TrainConfig, on_gpu: bool = False
) -> int:
    """Runs `action` with the configuration of `conf/<name>.yaml` and the command line, as an instance of `schema`.

    Args:
        on_gpu: whether settings that depend on the device are those for a GPU, also where there is none.

    Returns:
        The exit code. Its message is printed once on each host, see `lrsa_ds.process.exit_message`.
    """
    if not gc.isenabled():  # see no_gc.py
        gc.enable()
        gc.freeze()  # imported objects stay: collections need not examine them
    try:
        return Exit.DONE if _composed_and_run(action, name, schema, on_gpu) else Exit.FAILED
    except Stopped as stopped:
        return report_exit(str(stopped), Exit.STOPPED)
    except LRSAError as error:
        return report_exit(f"error: {error}", Exit.REFUSED)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno in NOT_WRITABLE:
            return report_exit(f"error: {error.filename} cannot be written or read ({error.strerror}).", Exit.REFUSED)
        if not _lost_a_rank(error):
            return report_exit(traceback.format_exc().rstrip(), Exit.FAILED)
        code = reported_exit(EXIT_MESSAGE_SECONDS)
        lost = f"error: rank {rank()} lost another rank of the run, which ended without a word."
        return report_exit(lost, Exit.LOST) if code is None else code


def _composed_and_run(action: Callable[[Any], bool], name: str, schema: type, on_gpu: bool) -> bool:
    check_launcher()
    # The deepspeed launcher appends --local_rank=N, which Hydra would refuse; the environment has the same number.
    sys.argv = [plain_keys(argument) for argument in sys.argv if not argument.startswith("--local_rank")]
    if {"-m", "--multirun"} & set(sys.argv):
        raise LRSAError("sweeps have their own command: python launch/sweep.py --multirun ...")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are reported here, in one sentence
    register_resolver(on_gpu)
    register_checkout()
    register_schema(name, schema)
    succeeded, failure = False, None

    def task(composed: DictConfig) -> None:
        nonlocal succeeded, failure
        try:
            if issubclass(schema, TrainConfig):
                PICKS.update(fit_defaults(composed, HydraConfig.get().overrides.task))
            config = typed_with_plugins(composed, schema)
            check_fetched(config.model)
            succeeded = action(config)
        except Exception as error:  # Hydra would print the overrides on every rank
            failure = error

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise every_mistake(error, sys.argv[1:], name, schema) from error
    if failure is not None:
        raise failure
    return succeeded
