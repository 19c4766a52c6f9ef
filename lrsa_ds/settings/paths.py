"""Settings that are paths."""

import os
from typing import Any

from lrsa_ds.errors import require


def require_paths(key: str, value: Any) -> None:
    paths = value if isinstance(value, list) else [value]
    valid = value is None or (paths != [] and all(isinstance(path, str) for path in paths))
    require(valid, f"{key}={value!r} is not valid: give a file, a directory or a glob pattern, or a list of these.")


def expand_home(settings: Any, *names: str) -> None:
    """Replaces the ~ at the beginning of these settings, paths or lists of paths, by the directory it stands for."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str):
            setattr(settings, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(settings, name, [os.path.expanduser(path) for path in value])
