"""Local data files: finding them, and fingerprints of their content."""

import hashlib
from glob import glob, has_magic
from pathlib import Path

from lrsa_ds.errors import LRSAError

JSON_SUFFIXES = (".jsonl", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_VALID = f"give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, a directory of them, a glob pattern, or a list"
_BLOCK = 1 << 20
# A fingerprint by samples reads this many blocks of a file, evenly spread, of this many bytes each.
_NUM_SAMPLED, _SAMPLED_BYTES = 64, 1 << 16


def find_files(key: str, value: str | list[str], subfolders: bool = False) -> list[str]:
    """The files that `value` names: a file, a directory or a glob pattern, or a list of these.

    The files of each item are sorted by name.

    Args:
        key: the setting that holds it, such as "data.path".
        subfolders: whether directories are searched recursively.

    Raises:
        LRSAError: no file is found, a suffix is unknown, JSON and Parquet are mixed, or a file is empty or named twice.
    """
    items = [value] if isinstance(value, str) else value
    found = [path for item in items for path in _files_of(key, item, subfolders)]
    known = set()
    for path in found:
        real = Path(path).resolve()
        if real in known:
            raise LRSAError(f"{key}={value!r} names {path} twice: give it once.")
        known.add(real)
        if Path(path).suffix not in SUFFIXES:
            raise LRSAError(f"{key}={value!r} includes {path}, whose suffix is not known: {_VALID}.")
        if Path(path).stat().st_size == 0:
            raise LRSAError(
                f"{key}={value!r} includes {path}, which is empty: every row needs one of the known shapes."
            )
    if len({is_parquet(path) for path in found}) > 1:
        raise LRSAError(f"{key}={value!r} mixes JSON and Parquet files: give one kind.")
    return found


def _files_of(key: str, value: str, subfolders: bool) -> list[str]:
    place = Path(value).expanduser()
    if place.is_dir():
        below = place.rglob("*") if subfolders else place.iterdir()
        found = sorted(str(path) for path in below if path.suffix in SUFFIXES and path.is_file())
    elif has_magic(value) and not place.exists():
        found = sorted(path for path in glob(str(place), recursive=True) if Path(path).is_file())
    else:
        found = [str(place)] if place.is_file() else []
    if not found:
        what = "holds no such file" if place.is_dir() else "matches no file" if has_magic(value) else "does not exist"
        raise LRSAError(f"{key}={value!r} {what}: {_VALID}.")
    return found


def is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


class ContentDigest:
    """A digest of the complete content of files; `update` receives the content in order."""

    def __init__(self):
        self._hash, self._num_files, self._num_bytes = hashlib.sha256(), 0, 0

    def update(self, data: bytes) -> None:
        self._hash.update(data)
        self._num_bytes += len(data)

    def end_file(self) -> None:
        self._num_files += 1
        self._hash.update(f"end at {self._num_bytes}".encode())

    def update_file(self, path: str) -> None:
        """Adds a complete file."""
        with open(path, "rb") as file:
            while data := file.read(_BLOCK):
                self.update(data)
        self.end_file()

    def __str__(self) -> str:
        return f"{self._num_files} files of {self._num_bytes:,} bytes, {self._hash.hexdigest()[:12]}"


def sampled_fingerprint(files: list[str]) -> str:
    """A fingerprint of files that are too large to read completely: sizes, modification times and samples of them."""
    digest, total = hashlib.sha256(), 0
    for path in files:
        stat = Path(path).stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        with open(path, "rb") as file:
            for number in range(_NUM_SAMPLED):
                file.seek((stat.st_size - _SAMPLED_BYTES) * number // (_NUM_SAMPLED - 1) if number else 0)
                digest.update(file.read(_SAMPLED_BYTES))
                if stat.st_size <= _SAMPLED_BYTES:
                    break
        total += stat.st_size
    return f"{len(files)} files of {total:,} bytes, {digest.hexdigest()[:12]} by their times and samples"
