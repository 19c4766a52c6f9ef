"""Many runs over the values of some keys, each under the deepspeed launcher in its own process group.

    python launch/sweep.py --multirun +recipe=smoke attention.retention=0.125,0.25,0.5 optim.lr=1e-5,2e-5
    python launch/sweep.py +recipe=qa_smollm2 +sweep=retention_lag --at-once 4 --gpus-per-job 2

Every job gets a directory below `output_dir` (default: outputs/<run_name>_sweep) and the W&B group of the sweep. A
failed job is reported, and the others continue. The same command resumes a sweep that was stopped. The results are a
table (sweep.txt) and a figure of score and step time over the swept keys (sweep.png).
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import launch.cli.interrupts  # noqa: E402, F401

# isort: split
import hydra  # noqa: E402
import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.core.override_parser.types import Override  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from launch.cli.accelerator import register_resolver  # noqa: E402
from launch.cli.checkout import CONF, register_checkout  # noqa: E402
from launch.cli.command import plain_keys  # noqa: E402
from launch.cli.defaults import fit_defaults  # noqa: E402
from launch.cli.mistakes import every_mistake  # noqa: E402
from launch.cli.plugins import typed_with_plugins  # noqa: E402
from launch.cli.schema import register_schema  # noqa: E402
from launch.cli.sentences import hydra_sentence, quoted  # noqa: E402
from lrsa_ds.config import TrainConfig  # noqa: E402
from lrsa_ds.directories.layout import OUTPUTS, SWEEP, check_directory, mark_directory  # noqa: E402
from lrsa_ds.directories.lock import locked  # noqa: E402
from lrsa_ds.errors import LRSAError, require  # noqa: E402
from lrsa_ds.inputs import check_inputs  # noqa: E402
from lrsa_ds.process.exits import Exit  # noqa: E402
from lrsa_ds.process.launcher import is_one_of_several  # noqa: E402
from lrsa_ds.sweep import Job, Runner, job_directory, job_name, result, results, sweep_table  # noqa: E402
from lrsa_ds.sweep_picture import draw_sweep  # noqa: E402

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Set by the sweep for every job.
OURS = ("output_dir", "log.group", "log.name")
# How a job that Hydra's launcher starts elsewhere (Slurm) receives the arguments of this program.
VARIABLE = "LRSA_SWEEP"
# Jobs to run once Hydra has listed all of them.
QUEUE: list[Job] = []


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=1, help="jobs that run at the same time, on GPUs of their own")
    parser.add_argument("--gpus-per-job", type=int, help="default: all GPUs, shared out among the jobs at once")
    parser.add_argument("--launcher", default="", help='for the deepspeed launcher, such as "--num_gpus 4"')
    options, typed = parser.parse_known_args()
    # Hydra does not accept a flag between two overrides.
    return options, sorted(typed, key=lambda argument: argument not in ("-m", "--multirun"))


def slots_of(at_once: int, gpus_per_job: int | None) -> list[list[int] | None]:
    """The GPUs of each job that runs at the same time; with None the launcher chooses."""
    require(at_once >= 1, f"--at-once={at_once} is not valid: give at least 1.")
    count = torch.cuda.device_count()
    if count == 0 or (at_once == 1 and gpus_per_job is None):
        return [None] * at_once
    size = gpus_per_job or count // at_once
    require(
        size >= 1 and size * at_once <= count,
        f"--at-once={at_once} jobs of {max(size, 1)} GPUs do not fit on {count} GPUs: lower one of the two.",
    )
    return [list(range(i * size, (i + 1) * size)) for i in range(at_once)]


def parsed(overrides: list[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides([o for o in overrides if not o.startswith("-")])


def base_config(typed: list[str]) -> TrainConfig:
    """The configuration without the swept keys: it has the sweep's directory, and checks the other keys."""
    others = [o for o in parsed(typed) if not o.is_sweep_override()]
    fixed = [str(o.input_line) for o in others if re.split("[./]", o.key_or_group)[0] not in ("hydra", "sweep")]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", fixed)
            fit_defaults(composed, fixed)
            return typed_with_plugins(composed, TrainConfig)
    except (HydraException, OmegaConfBaseException) as error:
        raise every_mistake(error, fixed, "train", TrainConfig) from error


def sweep_directory(config: TrainConfig) -> Path:
    return Path(config.output_dir or OUTPUTS / f"{config.run_name}_sweep").expanduser().resolve()


def task(composed: DictConfig) -> float | None:
    """One job, called by Hydra's launcher, here or elsewhere. Returns its score."""
    settings, ours = HydraConfig.get(), json.loads(os.environ[VARIABLE])
    swept = [o.key_or_group for o in parsed(ours["typed"]) if o.is_sweep_override()]
    swept += [key for key in settings.sweeper.get("params", None) or {} if key not in swept]
    job = job_of(composed, list(settings.overrides.task), swept, Path(ours["directory"]))
    if ours["at_once"] > 1:
        require(
            settings.sweeper._target_ == BASIC,
            "--at-once works only with Hydra's basic sweeper: other sweepers wait for each result.",
        )
        QUEUE.append(job)
        return None
    make_runner(ours).run(job)
    return result(job.directory).get("score")


def job_of(composed: DictConfig, overrides: list[str], swept_keys: list[str], root: Path) -> Job:
    """Hydra's configuration of one job, as a separate run."""
    values = dict(o.lstrip("+").split("=", 1) for o in overrides)
    swept = {key: values[key] for key in swept_keys if key in values}
    passed_on = [o for o in overrides if o.lstrip("+").split("=", 1)[0] not in (*OURS, "sweep")]
    name = job_name(swept)
    group = composed.log.group or root.name
    directory = root / job_directory(swept)
    ours = {"output_dir": directory, "log.group": group, "log.name": name}
    return Job(directory, swept, passed_on + [f"{key}={quoted(value)}" for key, value in ours.items()])


def make_runner(ours: dict) -> Runner:
    runner = Runner(ROOT, shlex.split(ours["launcher"]), slots_of(ours["at_once"], ours["gpus_per_job"]))

    def interrupt(*_) -> None:
        print("stopping the running jobs; the same command resumes the sweep", file=sys.stderr, flush=True)
        runner.stop()
        os._exit(Exit.INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return runner


def report(directory: Path) -> int:
    """Prints the table and draws the figure of all jobs; returns 1 if one has failed."""
    rows = results(directory)
    table = sweep_table(rows)
    print(f"\n{table}\n\nexact answers and answer tokens: mean over tasks, under the smallest cache; {directory}")
    (directory / "sweep.txt").write_text(table + "\n", encoding="utf-8")
    draw_sweep(rows, directory / "sweep.png", directory.name)
    return Exit.FAILED if any(row["status"] != "done" for row in rows) else Exit.DONE


def main() -> int:
    options, typed = arguments()
    sys.argv = [sys.argv[0], *map(plain_keys, typed)]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_resolver()
    register_checkout()
    register_schema("train", TrainConfig)
    try:
        require(
            not is_one_of_several(),
            "a sweep starts its ranks itself: start it as one process, without torchrun, deepspeed, srun or mpirun.",
        )
        has_values = any(flag in typed for flag in ("-m", "--multirun"))
        require(
            has_values or any(o.key_or_group == "sweep" for o in parsed(typed)),
            "a sweep needs --multirun with values such as optim.lr=1e-5,2e-5, or a ready one such as +sweep=lr.",
        )
        slots_of(options.at_once, options.gpus_per_job)
        config = base_config(typed)
        directory = sweep_directory(config)
        check_inputs(directory, config.model, config.data)
        check_directory(directory, SWEEP)
        ours = vars(options) | {"typed": typed, "directory": str(directory)}
        os.environ[VARIABLE] = json.dumps(ours)
        with locked(directory):
            mark_directory(directory, SWEEP)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
            make_runner(ours).run_all(QUEUE)
            return report(directory)
    except (LRSAError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {hydra_sentence(error)}", file=sys.stderr, flush=True)
        return Exit.REFUSED


if __name__ == "__main__":
    sys.exit(main())
