"""Checks that no input of a command is in the directory that it writes to."""

import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from lrsa_ds.errors import require
from lrsa_ds.hub import looks_local
from lrsa_ds.models.adapters import find_adapters
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.model import ModelConfig


def check_inputs(directory: Path, model: ModelConfig, data: DataConfig | None = None, **more: str | None) -> None:
    """Refuses an output directory that contains inputs, directly or behind links.

    Args:
        more: other paths or patterns, by key.

    Raises:
        LRSAError: names the key.
    """
    paths = [("model.name", model.name), ("model.tokenizer", model.tokenizer), *more.items()]
    if adapters := find_adapters(model):
        paths.append(("model.name", adapters.base.name))
    for source in [] if data is None else [data, *data.sources]:
        paths.append(("data.name", source.name))
        for key, value in (("data.path", source.path), ("data.validation_path", source.validation_path)):
            paths += [(key, item) for item in (value if isinstance(value, list) else [value])]
    for key, value in paths:
        if value is None or (key in ("model.name", "model.tokenizer", "data.name") and not looks_local(value)):
            continue
        for place in _places(value):
            behind = "" if str(place) == value else f", with {place},"
            require(
                not _is_inside(place, directory),
                f"{key}={value!r}{behind} lies in output_dir={directory}, where a run replaces and removes files: "
                "choose another output_dir.",
            )


def _places(value: str) -> Iterator[Path]:
    """The paths that a path or pattern names, and the links in a directory, which may lead anywhere."""
    place = Path(value).expanduser()
    if not place.exists():
        yield from map(Path, glob(str(place), recursive=True))
        return
    yield place
    if place.is_dir():
        yield from (path for path in place.iterdir() if path.is_symlink())


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether `path`, by its name or behind links, is `directory` or is in it; compares files, not names."""
    if not directory.exists():
        return False
    everywhere = (Path(os.path.abspath(path)), path.resolve())
    return any(place.exists() and place.samefile(directory) for one in everywhere for place in (one, *one.parents))
