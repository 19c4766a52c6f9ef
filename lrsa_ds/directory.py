"""Directories that a run writes: whose they are, and what in them it may remove."""

from pathlib import Path


def follow_umask(directory: Path) -> None:
    """Gives the files of a directory the mode that any new file has here; safetensors makes its own for the owner."""
    probe = directory / ".mode"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)
