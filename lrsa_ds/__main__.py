"""The commands, from any directory and without a checkout: `python -m lrsa_ds COMMAND [argument ...]`.

`python -m lrsa_ds train +recipe=smoke` does what `launch/train.py` does in a checkout, which it also takes its settings
from; an installed package has both inside.
"""

import os
import re
import runpy
import sys
from pathlib import Path

import torch

import lrsa_ds
from lrsa_ds.process.exits import Exit
from lrsa_ds.process.launcher import is_one_of_several

PACKAGE = Path(__file__).resolve().parent
# In a wheel (setup.py) `launch`, `conf` and what they need lie in the package, in a checkout beside it.
ROOT = PACKAGE / "_checkout" if (PACKAGE / "_checkout").is_dir() else PACKAGE.parent

COMMANDS = {
    "train": "trains a model: settings, recipes and key=value as for `deepspeed launch/train.py`",
    "evaluate": "answers of a model under compressed caches, or what each layer loses",
    "chat": "questions about a long file",
    "plan": "memory and time of a run on GPUs that need not be here",
    "sweep": "several runs over the values of some keys, and their table",
    "compare": "compares runs question by question",
    "selftest": "checks that sequence parallelism does not change a run",
    "harness": "the LM evaluation harness with a compressed cache",
    "benchmark": "times attention, prefilling and decoding",
    "benchmark_steps": "times training steps",
}
SHARED = ("train", "evaluate", "selftest")  # what several GPUs do together
# Flags of Hydra, which concern the settings and not the launcher.
HYDRA = {"-h", "--help", "--hydra-help", "--info", "-c", "--cfg", "-p", "--package", "--resolve", "-m", "--multirun"}
USAGE = f"""usage: python -m lrsa_ds COMMAND [argument ...]

commands:
{chr(10).join(f"  {name:<16} {meaning}" for name, meaning in COMMANDS.items())}

{", ".join(SHARED[:-1])} and {SHARED[-1]} use all GPUs of this machine through the deepspeed launcher, whose flags come
before the settings: `python -m lrsa_ds train --num_gpus 2 +recipe=smoke`. With one GPU or none, and without such a
flag, they run in one process. `python -m lrsa_ds --version` prints the version."""


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The leading flags of the deepspeed launcher with their values, and the settings after them."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-") and arguments[place] not in HYDRA:
        has_value = "=" not in arguments[place] and place + 1 < len(arguments) and _is_value(arguments[place + 1])
        place += 2 if has_value else 1
    return arguments[:place], arguments[place:]


def _is_value(word: str) -> bool:
    """Whether a word after a flag belongs to it: a setting has "=" behind its key, or begins with "+" or "~"."""
    return re.match(r"-|[+~]|[\w./@-]+=", word) is None


def command_line(command: str, arguments: list[str], num_gpus: int, is_rank: bool) -> list[str] | None:
    """The command line of the launcher that has to run a command; None to run it in this process.

    Args:
        num_gpus: that this process sees.
        is_rank: whether a launcher has started this process.
    """
    flags, settings = split_flags(arguments)
    asks_hydra = not HYDRA.isdisjoint(settings)
    if command not in SHARED or is_rank or (not flags and (num_gpus < 2 or asks_hydra)):
        return None
    script = str(ROOT / "launch" / f"{command}.py")
    return [sys.executable, "-m", "deepspeed.launcher.runner", *flags, script, *settings]


def main() -> int:
    # The launcher, as `deepspeed --module lrsa_ds`, puts its own argument in front.
    typed = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    command, arguments = (typed[0], typed[1:]) if typed else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return Exit.DONE
    if command == "--version":
        print(lrsa_ds.__version__)
        return Exit.DONE
    if command not in COMMANDS:
        print(f"error: there is no command {command!r}; valid here: {', '.join(COMMANDS)}.", file=sys.stderr)
        return Exit.REFUSED
    is_rank = "RANK" in os.environ or is_one_of_several()
    line = command_line(command, arguments, torch.cuda.device_count(), is_rank)
    if line is not None:
        # The ranks look for tools such as ninja on the PATH.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        os.execv(line[0], line)
    script = ROOT / "launch" / f"{command}.py"
    sys.argv = [str(script), *arguments]
    if sys.path[0] in ("", os.getcwd()):  # as of a script: what lies in the working directory hides no library
        sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
