"""Errors of loading by name, from the hub or from files, as one sentence each."""

import errno
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lrsa_ds.errors import LRSAError

# Errors of a place that exists but cannot be written.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# Advice by key.
_INSTEAD = {
    "model.name": "set model.name to a local directory (and model.tokenizer too if it holds no tokenizer)",
    "model.tokenizer": "set model.tokenizer to a local directory that holds a tokenizer",
    "data.name": "use data=files with data.path set to local JSONL or Parquet files",
}


def looks_local(name: str) -> bool:
    """Whether `name` must be a local path (./x, ../x, ~/x, /x, a/b/c, or anything that exists)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def resolve_name(key: str, name: str) -> str:
    """`name` for the Hugging Face libraries: a path with ~ expanded, or a hub name unchanged.

    Raises:
        LRSAError: a path does not exist; the libraries would report a malformed hub name.
    """
    if not looks_local(name):
        return name
    path = Path(name).expanduser()
    if not path.exists():
        raise LRSAError(f"{key}={name!r} does not exist: give a directory that exists or a name of the hub.")
    if not path.is_dir():
        gguf = " and model.gguf_file" if key == "model.name" and path.suffix == ".gguf" else ""
        raise LRSAError(f"{key}={name!r} is a file: give its directory, {path.parent},{gguf} or a name of the hub.")
    return str(path)


def cache_error(error: BaseException, own: Path | None = None) -> LRSAError | None:
    """The error for a cache that cannot be written, if that is the cause of `error`; else None.

    Args:
        own: a path of the user that was read; errors there do not concern the cache.
    """
    for found in _chain(error):
        if isinstance(found, OSError) and found.errno in NOT_WRITABLE:
            place = str(found.filename or "of the hub's libraries")
            if own is None or not Path(place).is_relative_to(own):
                return LRSAError(
                    f"the cache {place} cannot be written ({found.strerror}): set HF_HOME to a directory that can be."
                )
    return None


def hub_error(key: str, name: str, error: BaseException) -> LRSAError:
    """The error to raise for an `error` of a Hugging Face library while it loaded `name`.

    Args:
        key: the setting of the name: "model.name", "model.tokenizer" or "data.name".
        name: its value.
        error: the exception; its causes are examined too.
    """
    # Only needed for an error, and the import takes a second.
    from datasets.exceptions import DatasetNotFoundError

    chain = _chain(error)
    if (unwritable := cache_error(error, Path(name) if looks_local(name) else None)) is not None:
        return unwritable
    instead = _INSTEAD.get(key, f"set {key} to a local directory")
    if any(isinstance(e, GatedRepoError) for e in chain):
        return LRSAError(f"{key}={name!r} is gated on the hub: ask for access there and log in, or {instead}.")
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return LRSAError(f"{key}={name!r} has no such revision on the hub: correct the revision, or {instead}.")
    if any(isinstance(e, (RepositoryNotFoundError, DatasetNotFoundError, HFValidationError)) for e in chain):
        return LRSAError(
            f"{key}={name!r} is neither a directory here nor on the hub, or private: correct the name, log in, or "
            f"{instead}."
        )
    unreachable = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError)
    if any(isinstance(e, unreachable) for e in chain):
        return LRSAError(f"{key}={name!r} is not on this machine and the hub cannot be reached: {instead}.")
    return LRSAError(f"{key}={name!r} cannot be loaded ({first_line(error)}): check its files, or {instead}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or of its cause, which says more than the wrapper."""
    said = error.__cause__ if isinstance(error.__cause__, Exception) else error
    lines = str(said).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(said).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
