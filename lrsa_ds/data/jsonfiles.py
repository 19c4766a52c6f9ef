"""JSONL and JSON files, read row by row at their byte offsets; text is never changed.

A file has one of two layouts: one row per line, or an array of rows. The array is the complete file, or the member
`data` of one object (SQuAD's form). Memory is bounded by the largest row and 28 bytes for each row.
"""

import codecs
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from lrsa_ds.errors import LRSAError

CHUNK = 1 << 20
_BOM = codecs.BOM_UTF8
_OTHER_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# `data` is searched for in this many bytes of an object: the members before it are small.
_SEARCHED = 1 << 20
_DECODER = json.JSONDecoder()
_BLANK, _BLANK_OR_COMMA = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t\n\r,]*")
_ARRAY_OF_OBJECTS = re.compile(r"\[\s*\{")


class Span(NamedTuple):
    """Where a row is: the bytes `start` to `stop` of a file.

    These bytes may hold several rows, as a SQuAD article does; `part` is the number of the row among them. `number` is
    that of the line, or of the element of the array; `unit` says which.
    """

    start: int
    stop: int
    part: int
    number: int
    unit: str


class Found(NamedTuple):
    """A piece of a file that holds a row, or an article of several rows."""

    path: str
    unit: str
    number: int
    start: int
    data: bytes

    @property
    def place(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"


def found_rows(path: str, on_bytes: Callable[[bytes], None] = lambda data: None) -> Iterator[Found]:
    """The pieces of a file in order, not parsed, each with its place for errors.

    Args:
        on_bytes: called with all bytes of the file, in order.

    Raises:
        LRSAError: the file is not UTF-8 text, or holds an array that cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(2)
        if head in _OTHER_BOMS:
            raise LRSAError(f"{path} is UTF-16 text: save it as UTF-8.")
        file.seek(0)
        start = _array_start(file)
        file.seek(0)
        if start is None:
            yield from _lines(file, path, on_bytes)
        else:
            on_bytes(file.read(start))
            yield from _elements(_Text(file, path, start, on_bytes))


def rows_in(found: Found) -> list[Any]:
    """The rows of a piece, parsed: one row, or every question of an article.

    Raises:
        LRSAError: broken JSON; the message names the place.
    """
    row = _parsed(found.data, found.place)
    paragraphs = row.get("paragraphs") if isinstance(row, dict) else None
    is_article = isinstance(paragraphs, list) and all(isinstance(p, dict) and "qas" in p for p in paragraphs)
    if not paragraphs or not is_article:
        return [row]
    asked = [(paragraph.get("context"), qa) for paragraph in paragraphs for qa in paragraph["qas"] or ()]
    title = {"title": row["title"]} if "title" in row else {}
    return [{**title, **qa, "context": context} if isinstance(qa, dict) else qa for context, qa in asked]


def spans_of(found: Found, count: int | None = None) -> list[Span]:
    """The spans of the rows of a piece. If their `count` is not given, an article is parsed to find it."""
    if count is None:
        count = len(rows_in(found)) if b'"paragraphs"' in found.data else 1
    stop = found.start + len(found.data)
    return [Span(found.start, stop, part, found.number, found.unit) for part in range(count)]


def read_span(path: str, span: Span) -> Any:
    """The row at a span.

    Raises:
        LRSAError: the file has changed, so the row is not there any more; the message names the file.
    """
    rows = _rows_at(path, span._replace(part=0))
    if span.part >= len(rows):
        raise LRSAError(f"{path} has changed while it was read.")
    return rows[span.part]


@lru_cache(maxsize=1)  # the questions of an article are mostly read in order
def _rows_at(path: str, span: Span) -> list[Any]:
    with open(path, "rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    return rows_in(Found(path, span.unit, span.number, span.start, data))


class SpanIndex:
    """The spans of all rows of some files, in 28 bytes each."""

    def __init__(self, files: list[str]):
        self.files = files
        self._starts, self._stops, self._numbers, self._parts = array("q"), array("q"), array("q"), array("i")
        self._ends: list[int] = []  # for each complete file: the number of rows up to its end
        self._units: list[str] = []

    def add(self, span: Span) -> None:
        """Adds a row of the file that is being read."""
        self._starts.append(span.start)
        self._stops.append(span.stop)
        self._parts.append(span.part)
        self._numbers.append(span.number)
        self._unit = span.unit

    def end_file(self) -> None:
        self._ends.append(len(self._starts))
        self._units.append(self._unit)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[str, Span]:
        file = bisect_right(self._ends, index)
        numbers = self._starts[index], self._stops[index], self._parts[index], self._numbers[index]
        return self.files[file], Span(*numbers, self._units[file])


def place_of(path: str, span: Span) -> str:
    """The file with the line or row, and the question of an article; all counted from 1."""
    question = f", question {span.part + 1}" if span.part else ""
    return f"{path}, {span.unit} {span.number}{question}"


def _lines(file: BinaryIO, path: str, on_bytes: Callable[[bytes], None]) -> Iterator[Found]:
    start = 0
    for number, line in enumerate(file, start=1):
        on_bytes(line)
        if line.strip():
            mark = len(_BOM) if start == 0 and line.startswith(_BOM) else 0
            yield Found(path, "line", number, start + mark, line[mark:])
        start += len(line)


def _parsed(data: bytes, place: str) -> Any:
    try:
        # Decoded here: json.loads would guess the encoding of bytes.
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise LRSAError(f"{place}: broken JSON ({error.msg} at column {error.colno}).") from None
    except UnicodeDecodeError:
        raise LRSAError(f"{place}: broken JSON (it is not UTF-8 text).") from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, or too many levels
        raise LRSAError(f"{place}: broken JSON ({str(error).split(';')[0]}).") from None


class _Text:
    """A window that moves forward over the text of a file.

    Args:
        start: the byte at which the window begins.
    """

    def __init__(self, file: BinaryIO, path: str, start: int, on_bytes: Callable[[bytes], None]):
        self.file, self.path, self.start, self.on_bytes = file, path, start, on_bytes
        self.text, self.place = "", 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        file.seek(start)

    def more(self) -> bool:
        """Extends the window, by more if it is long already; returns whether the file had more text."""
        data = self.file.read(max(CHUNK, len(self.text) - self.place))
        self.on_bytes(data)
        try:
            self.text = self.text[self.place :] + self._decode(data, final=not data)
        except UnicodeDecodeError:
            raise LRSAError(f"{self.path}: broken JSON (it is not UTF-8 text).") from None
        self.place = 0
        return bool(data)

    def move(self, place: int) -> str:
        """Moves the window forward to a place in it, and returns the text before that place."""
        passed, self.place = self.text[self.place : place], place
        self.start += len(passed.encode("utf-8"))
        return passed

    def skip(self, blank: re.Pattern) -> str:
        """Moves to the next character that is not blank, and returns it; "" at the end."""
        while True:
            self.move(_end(blank, self.text, self.place))
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]

    def value(self) -> str:
        """Moves past the JSON value that begins here, and returns its text.

        Raises:
            json.JSONDecodeError: there is no valid value.
        """
        while True:
            try:
                return self.move(_DECODER.raw_decode(self.text, self.place)[1])
            except json.JSONDecodeError:
                if not self.more():
                    raise


def _array_start(file: BinaryIO) -> int | None:
    """The byte at which the array of rows begins, or None for a file with one row per line."""
    head = file.read(_SEARCHED)
    mark = len(_BOM) if head.startswith(_BOM) else 0
    text = head[mark:].lstrip()
    offset = len(head) - len(text)
    if text.startswith(b"["):
        return offset
    if not text.startswith(b"{"):
        return None
    first, _, rest = text.partition(b"\n")
    if rest.strip():
        try:
            json.loads(first.decode("utf-8"))
            return None  # a first row, and more of them
        except ValueError:
            pass
    start = _member_data(head[offset:])
    return None if start is None else offset + start


def _member_data(head: bytes) -> int | None:
    """The byte of `head` at which the array in its member `data` begins; None if it is not found."""
    text = head.decode("utf-8", errors="ignore")
    place = 1
    try:
        while True:
            key, place = _DECODER.raw_decode(text, _end(_BLANK, text, place))
            place = _behind(text, place, ":")
            if key == "data" and _ARRAY_OF_OBJECTS.match(text, place):
                return len(text[:place].encode("utf-8"))
            _, place = _DECODER.raw_decode(text, place)
            place = _behind(text, place, ",")
    except ValueError:  # no such member, or not within `head`
        return None


def _behind(text: str, place: int, mark: str) -> int:
    """The place of the next character after `mark` that is not blank."""
    place = _end(_BLANK, text, place)
    if not text.startswith(mark, place):
        raise ValueError(f"no {mark}")
    return _end(_BLANK, text, place + len(mark))


def _end(blank: re.Pattern, text: str, place: int) -> int:
    """The end of the match of `blank` at `place`."""
    found = blank.match(text, place)
    assert found is not None  # a match may be empty
    return found.end()


def _elements(text: _Text) -> Iterator[Found]:
    """The elements of the array at the beginning of the text."""
    text.skip(_BLANK)
    text.move(text.place + 1)
    number = 0
    while (mark := text.skip(_BLANK_OR_COMMA)) != "]":
        number += 1
        found = Found(text.path, "row", number, text.start, b"")
        if not mark:
            raise LRSAError(f"{found.place}: broken JSON (the array has no end).")
        try:
            yield found._replace(data=text.value().encode("utf-8"))
        except json.JSONDecodeError as error:
            raise LRSAError(f"{found.place}: broken JSON ({error.msg}).") from None
    while text.more():  # text after the array counts for the digest too
        text.place = len(text.text)
