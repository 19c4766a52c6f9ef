"""Directories that a command writes: whose they are, and what in them it may replace or remove.

A file of our own marks a directory. Without this mark a directory that holds anything is left as it is. With it, only
files that the command writes are ever replaced or removed, each by its path; what else lies there stays.
"""

import json
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lrsa_ds.directories.lock import LOCK
from lrsa_ds.errors import LRSAError, require

MARK = "lrsa_run.json"
PROGRAM = "lrsa-ds"
CONSOLE = "console.log"
OUTPUTS = Path("outputs")  # below which a run without output_dir gets a directory
# Paths below the folder that they belong to; one that ends in "/" is a folder, which goes when it is empty.
_MODEL = (
    r"(config|generation_config|adapter_config|model\.safetensors\.index|lrsa|rope|quantization)\.json"
    r"|(adapter_)?model\.safetensors|model-\d+-of-\d+\.safetensors"
    r"|(tokenizer\w*|special_tokens_map|added_tokens|vocab|tekken)\.json|(vocab|merges)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.(jinja|json)|additional_chat_templates/([\w.-]+\.jinja)?"
    r"|(modeling|configuration|tokenization)_\w+\.py"
)
MODEL_FILES = rf"{_MODEL}|base/({_MODEL})?"  # beside adapters there may be their base
UNIVERSAL_FILES = r"([\w.-]+/)*([\w.-]+\.(pt|\d+))?"
STEP_FILES = (
    r"trainer\.json|latest\w*|zero_to_\w+\.py|state/([\w.-]+_states\.pt)?"
    rf"|universal(\.partial)?/({UNIVERSAL_FILES})"
)
CHECKPOINT_FILES = rf"step_\d+(\.partial)?/({STEP_FILES})?"


@dataclass(frozen=True)
class Layout:
    """What a command writes into its directory, beside the mark and the lock.

    Args:
        command: its name in the mark.
        files: regular expressions of files at the top, all of which it may replace or remove.
        folders: by name, regular expressions of the files and folders in them that it may replace or remove.
        permanent: what it writes and never removes.
    """

    command: str
    files: tuple[str, ...]
    folders: dict[str, str] = field(default_factory=dict)
    permanent: tuple[str, ...] = ("wandb", "tensorboard", "mlflow")

    def is_file(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.files)

    def knows(self, name: str) -> bool:
        """Whether something of this name at the top may be the command's."""
        return self.is_file(name) or name in self.folders or name in self.permanent


_MODELS = {f"{name}{state}": MODEL_FILES for name in ("model", "best") for state in ("", ".partial")}
TRAIN = Layout(
    "train",
    (
        r"COMPLETED|STOPPED|config\.yaml|(metrics|predictions|answers)\.(jsonl|partial)|evaluation\.(txt|png)|trace\.json",
        r"(wandb|mlflow)_run\.txt|telemetry_\w+\.(json|png)",
        re.escape(CONSOLE),
    ),
    {"checkpoints": CHECKPOINT_FILES, "ranks": r"\d+(\.partial)?", **_MODELS},
)
EVALUATE = Layout(
    "evaluate",
    (
        r"config\.yaml|metrics\.jsonl|results(\.rank\d+)?\.jsonl(\.partial)?|results\.(txt|html)",
        r"(scores_\d+|needles|perplexity)\.png|(wandb|mlflow)_run\.txt|telemetry_\w+\.(json|png)",
        re.escape(CONSOLE),
    ),
)
SWEEP = Layout("sweep", (r"sweep\.(txt|png)",), permanent=())


def check_directory(directory: Path, layout: Layout, may_adopt: bool = False) -> None:
    """Refuses a directory that is not one of this command's runs, and says what is in the way. Changes nothing.

    Args:
        may_adopt: whether one without a mark will do that holds nothing but what the command writes.

    Raises:
        LRSAError: it holds something and is not marked, belongs to another command, or has links where files are.
    """
    require(
        directory.is_dir() or not os.path.lexists(directory),
        f"output_dir={directory} is not a directory: choose another.",
    )
    names = _names(directory)
    command = marked_by(directory)
    require(
        command in (None, layout.command),
        f"output_dir={directory} belongs to a run of launch/{command}.py: choose another directory.",
    )
    in_the_way = [] if command else [name for name in names if not (may_adopt and layout.knows(name))]
    require(
        not in_the_way,
        f"output_dir={directory} holds {listed(in_the_way)} and is not marked as the directory of a run: "
        "choose an empty or a new directory.",
    )
    links = [name for name in names if layout.knows(name) and (directory / name).is_symlink()]
    require(
        not links,
        f"output_dir={directory} has a link where a run writes its own files, {listed(links)}: remove the link, or "
        "choose another directory.",
    )


def _names(directory: Path) -> list[str]:
    """What a directory holds, without locks."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LRSAError(f"output_dir={directory} cannot be read: {error.strerror}.") from error
    return [name for name in names if name != LOCK and not name.startswith(f"{LOCK}.")]


def listed(names: list[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def marked_by(directory: Path) -> str | None:
    """The command whose mark a directory carries, or None."""
    path = directory / MARK
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise LRSAError(f"{path} cannot be read: {error.strerror}.") from error
    is_ours = isinstance(mark, dict) and mark.get("program") == PROGRAM and not path.is_symlink()
    return mark.get("command") if is_ours else None


def mark_directory(directory: Path, layout: Layout) -> None:
    """Marks a directory that `check_directory` has accepted, unless it is marked already."""
    if marked_by(directory) is None:
        mark = {"program": PROGRAM, "command": layout.command, "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        partial = directory / f"{LOCK}.mark"  # the name is under the lock's protection, and removed with its leftovers
        partial.write_text(json.dumps(mark) + "\n", encoding="utf-8")
        os.replace(partial, directory / MARK)


def remove_run(directory: Path, layout: Layout, only: Collection[str] | None = None) -> None:
    """Removes what a run has left at the top and in its folders; with `only`, of these names alone."""
    for name in _names(directory):
        if only is not None and name not in only:
            continue
        path = directory / name
        if name in layout.folders:
            remove_files(path, layout.folders[name])
        elif layout.is_file(name) and path.is_file():
            path.unlink()


def remove_files(folder: Path, pattern: str) -> list[Path]:
    """Removes the files below `folder` whose paths match, and then the folders that are empty and match, itself too.

    Links are not followed. Returns the files that are left, by their paths below `folder`.
    """
    left = []
    for place, _, files in os.walk(folder, topdown=False):
        here = Path(place).relative_to(folder)
        for name in files:
            if re.fullmatch(pattern, (here / name).as_posix()):
                (folder / here / name).unlink(missing_ok=True)
            else:
                left.append(here / name)
        if here == Path() or re.fullmatch(pattern, f"{here.as_posix()}/"):
            with suppress(OSError):  # it holds something else
                (folder / here).rmdir()
    return left


def replace_folder(partial: Path, final: Path, pattern: str, foreign: Collection[Path] = ()) -> None:
    """Puts a folder in the place of an earlier one. What else lies in that one stays there, beside the new files.

    Args:
        pattern: of the earlier one's files that go.
        foreign: files in `partial` that stay there, by their paths below it.
    """
    remove_files(final, pattern)
    if not foreign and not final.exists():
        partial.rename(final)
        return
    for place, _, files in os.walk(partial, topdown=False):
        here = Path(place).relative_to(partial)
        for name in files:
            if here / name not in foreign:
                (final / here).mkdir(parents=True, exist_ok=True)
                os.replace(partial / here / name, final / here / name)
        with suppress(OSError):  # something stays in it
            (partial / here).rmdir()


def follow_umask(directory: Path) -> None:
    """Gives the files of a directory the mode that any new file has here; safetensors makes its own for the owner."""
    probe = directory / ".mode"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)
