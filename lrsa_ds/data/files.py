"""JSONL, JSON and Parquet files on this machine: found, and checked row by row so that an error names its place."""

import hashlib
import json
from collections.abc import Iterator
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lrsa_ds.data.shapes import ReadRow
from lrsa_ds.errors import LRSAError

HASHED_BYTES = 1 << 20
JSON_SUFFIXES = (".jsonl", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


def find_files(key: str, value: str) -> list[str]:
    """The files that `value`, a file, a directory or a glob pattern, stands for, in the order of their names.

    Args:
        key: the setting that holds it, "data.path" or "data.validation_path".

    Raises:
        LRSAError: nothing is there, a suffix is unknown, JSON and Parquet are mixed, or a file is empty.
    """
    place = Path(value).expanduser()
    if place.is_dir():
        found = sorted(str(path) for path in place.iterdir() if path.suffix in SUFFIXES)
    elif has_magic(value) and not place.exists():
        found = sorted(path for path in glob(str(place), recursive=True) if Path(path).is_file())
    else:
        found = [str(place)] if place.is_file() else []
    valid = f"give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, a directory of them or a glob pattern"
    if not found:
        what = "holds no such file" if place.is_dir() else "matches no file" if has_magic(value) else "does not exist"
        raise LRSAError(f"{key}={value!r} {what}: {valid}.")
    for path in found:
        if Path(path).suffix not in SUFFIXES:
            raise LRSAError(f"{key}={value!r} includes {path}, whose suffix is not known: {valid}.")
        if Path(path).stat().st_size == 0:
            raise LRSAError(
                f"{key}={value!r} includes {path}, which is empty: every row needs one of the known shapes."
            )
    if len({Path(path).suffix == ".parquet" for path in found}) > 1:
        raise LRSAError(f"{key}={value!r} mixes JSON and Parquet files: give one kind.")
    return found


def files_fingerprint(files: list[str]) -> str:
    """Number, size and content of files; of large ones their beginning and end stand for the content."""
    digest, total = hashlib.sha256(), 0
    for path in files:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(HASHED_BYTES, size - HASHED_BYTES))
            digest.update(file.read(HASHED_BYTES))
        digest.update(str(size).encode())
        total += size
    return f"{len(files)} files of {total:,} bytes, {digest.hexdigest()[:12]}"


def format_of(files: list[str]) -> str:
    """The name that `datasets` has for their format."""
    return "parquet" if files[0].endswith(".parquet") else "json"


def check_rows(files: list[str], read_row: ReadRow, limit: int | None = None) -> None:
    """Reads the rows of all files one after the other, only the first `limit` of them if given.

    Raises:
        LRSAError: a broken line or a row that `read_row` refuses, with its file and its 1-based line or row; or a
            file without any row.
    """
    left = limit
    for path in files:
        seen = 0
        for place, row in islice(rows_of(path), left):
            seen += 1
            try:
                read_row(row)
            except LRSAError as error:
                raise LRSAError(f"{place}: {error}") from None
        if seen == 0:
            raise LRSAError(f"{path} is empty: it has no rows.")
        if left is not None:
            left -= seen
            if left == 0:
                return


def rows_of(path: str) -> Iterator[tuple[str, Any]]:
    """Rows with the place to name in an error. It reads on its own, as `datasets` does not tell the line."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif _is_json_array(path):
        yield from _array_rows(path)
    else:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parquet_rows(path: str) -> Iterator[tuple[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise LRSAError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0].rstrip('.')}).") from None


def _is_json_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).lstrip().startswith(b"[")


def _array_rows(path: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(Path(path).read_bytes(), path)
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LRSAError(f"{place}: broken JSON ({error.msg} at column {error.colno}).") from None
    except UnicodeDecodeError:
        raise LRSAError(f"{place}: broken JSON (it is not UTF-8 text).") from None
