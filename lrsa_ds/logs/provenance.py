"""What a run was made with: the commit, the versions, and the size of model and world."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "lrsa-ds", "torch", "transformers", "deepspeed", "triton", "flash-attn-4", "liger-kernel", "peft", "bitsandbytes",
)  # fmt: skip
GIT_SECONDS = 10


def git_state(directory: Path) -> dict:
    """`git_commit` and `git_dirty` (whether tracked files differ from it) of a checkout; nothing of anything else."""
    if not (directory / ".git").exists():
        return {}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a file system that does not answer
        return {}
    if done.returncode != 0:  # no commit yet, or a checkout of another user
        return {}
    commit = done.stdout.strip()
    return {"git_commit": commit.removesuffix("-dirty"), "git_dirty": commit.endswith("-dirty")}


def versions() -> dict[str, str]:
    """Of Python, and of those `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance(world_size: int, num_parameters: int, device: str) -> dict:
    """The start of a run's record, beside its configuration."""
    made_with = git_state(Path(__file__).resolve().parents[1]) | {"versions": versions()}
    return {"world_size": world_size, "device": device, "num_parameters": num_parameters, **made_with}
