"""Errors that end a run with one sentence instead of a traceback, and the checks that raise them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class LRSAError(ValueError):
    """A mistake that the user can correct: the message is one sentence that names the key and the valid values."""


class Stopped(Exception):
    """A signal has stopped the run, after a checkpoint; the same command resumes from it."""


class LRSAErrors(LRSAError):
    """Several errors at once; `sentences` has their messages."""

    def __init__(self, sentences: Sequence[str]):
        self.sentences = list(sentences)
        super().__init__(" ".join(f"({number}) {sentence}" for number, sentence in enumerate(sentences, start=1)))


def all_of(sentences: Sequence[str]) -> LRSAError:
    """One error for several sentences, without repetition: for each key only the first sentence."""
    by_key: dict[str, str] = {}
    for sentence in sentences:
        by_key.setdefault(re.split("[=: ]", sentence, maxsplit=1)[0], sentence)
    different = list(by_key.values())
    return LRSAError(different[0]) if len(different) == 1 else LRSAErrors(different)


def sentences_of(error: LRSAError) -> list[str]:
    """The sentences of an error."""
    return error.sentences if isinstance(error, LRSAErrors) else [str(error)]


class Problems:
    """Collects the errors of independent checks, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Catches the `LRSAError` of one check."""
        try:
            yield
        except LRSAError as error:
            self._sentences += sentences_of(error)

    def raise_all(self) -> None:
        """Raises one `LRSAError` with all collected sentences, if there are any."""
        if self._sentences:
            raise all_of(self._sentences)


# Set while all mistakes of a configuration are collected: each is noted, and the checks continue.
_NOTED: ContextVar[list[str] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[list[str]]:
    """In this context `require` adds its message to the list instead of raising it, and continues."""
    noted: list[str] = []
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def require(condition: bool, message: str) -> None:
    """Raises `LRSAError(message)` unless `condition` holds."""
    if condition:
        return
    noted = _NOTED.get()
    if noted is None:
        raise LRSAError(message)
    noted.append(message)


def require_one_of(key: str, value: Any, valid: tuple) -> None:
    require(value in valid, f"{key}={value!r} is not valid: choose one of {', '.join(map(str, valid))}.")


def require_whole(key: str, value: Any, at_least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= at_least, f"{key}={value!r} is not valid: give a whole number of at least {at_least}.")
