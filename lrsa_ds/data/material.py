"""The material of generated contexts, split into training and validation: its rows, and how they are opened."""

from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from lrsa_ds.data.shapes import ToRow
from lrsa_ds.data.sources import Rows
from lrsa_ds.notices import say_once
from lrsa_ds.settings.data import DataConfig

Material = TypeVar("Material")


class Split(NamedTuple, Generic[Material]):
    """Passages or texts for training and for validation, without overlap.

    Args:
        label: the setting that names the data, for errors.
        fingerprint: identifies the data.
        num_bad: rows that cannot be used and are left out.
    """

    train: list[Material]
    held_out: list[Material]
    label: str
    fingerprint: str
    num_bad: int = 0


def all_rows(data: DataConfig, seed: int, to_row: ToRow | None, needs: str) -> Rows:
    """The rows of `data.path` or `data.name`, none of them held out; a row without the key `needs` is a bad row."""
    return Rows(_without_validation(data), seed, 0, to_row, needs=needs)


def validation_rows(data: DataConfig, seed: int, to_row: ToRow | None, needs: str) -> Rows | None:
    """The rows of `data.validation_path` or `data.validation_split`; None if neither is set."""
    key = split_key(data)
    other = getattr(data, f"validation_{key}")
    return None if other is None else all_rows(replace(_without_validation(data), **{key: other}), seed, to_row, needs)


def split_key(data: DataConfig) -> str:
    """The setting of the training rows; with `validation_` before it, that of the validation rows."""
    return "path" if data.source == "files" else "split"


def say_left_out(rows: Rows) -> None:
    """Prints once how many rows cannot be used, and the error of the first."""
    if rows.num_bad:
        label = rows.source.opened.label
        say_once(
            f"{label}: {rows.num_bad:,} rows are left out since they cannot be used; the first: {rows.first_error()}"
        )


def _without_validation(data: DataConfig) -> DataConfig:
    return replace(data, validation_path=None, validation_split=None)
