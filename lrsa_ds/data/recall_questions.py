"""Questions that are answered by a text itself, without labels: what follows, what is missing, what comes first.

A question quotes words that occur once in the text, so it has one answer, and the answer is a part of the text.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

from lrsa_ds.data.contexts import Asked

# In scripts without spaces a character counts as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_PARAGRAPH = re.compile(r"\S(?:.|\n(?!\s*\n))*")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
# A line with #, an underlined line, or a short line by itself without a mark at its end; then the text that follows.
_HEADING = re.compile(
    r"^(?:#{1,6}[ \t]+(?P<marked>\S.{0,119})\n"
    r"|(?P<underlined>\S.{0,79})\n(?:={3,}|-{3,}|~{3,}|\^{3,})[ \t]*\n"
    r"|(?<=\n\n)(?P<alone>[^\W_a-z][^\n]{2,58}[^\s.,:;!?])\n(?=\n))",
    re.MULTILINE,
)
_MARKED = re.compile(r"#{1,6}[ \t].*\n")
_MISSING = "____"

QUOTED_WORDS = 8  # of the sentence to continue, and of sentences whose order is asked for
ANSWER_WORDS = 10
LEAST_ANSWER_WORDS = 3
AROUND_WORDS = 6  # on each side of the missing word
LEAST_HIDDEN_CHARACTERS, MOST_HIDDEN_CHARACTERS = 5, 24
_TRIES = 24


class Recalled(NamedTuple):
    """A question about a text, and the ranges of characters of the text that it needs."""

    asked: Asked
    spans: tuple[tuple[int, int], ...]


class _Sentence(NamedTuple):
    start: int
    words: list[str]
    stops: list[int]  # for each word, the character of the text after it


class RecallText:
    """A text to ask questions about.

    Args:
        num_asked_about: questions are about this many characters at its beginning; quotes are unique in all of it.
    """

    def __init__(self, text: str, num_asked_about: int | None = None):
        self.text = text[:num_asked_about]
        self.flat = _flat(text)

    @cached_property
    def sentences(self) -> list[_Sentence]:
        """Sentences long enough to be quoted and continued."""
        return list(self._sentences())

    @cached_property
    def headings(self) -> list[re.Match]:
        """Headings whose title occurs once among the headings."""
        found = list(_HEADING.finditer(self.text))
        titles = [_title(match) for match in found]
        return [match for match, title in zip(found, titles, strict=True) if titles.count(title) == 1]

    def draw(self, task: str, rng: random.Random) -> Recalled | None:
        """A random question of the task; None if a few tries find none."""
        for _ in range(_TRIES):
            if (found := _DRAW[task](self, rng)) is not None:
                return found
        return None

    def is_unique(self, quote: str) -> bool:
        return self.flat.count(quote) == 1

    def _sentences(self) -> Iterator[_Sentence]:
        for paragraph in _PARAGRAPH.finditer(self.text):
            # Text directly under a heading begins after it.
            start = paragraph.start() + (match.end() if (match := _MARKED.match(paragraph.group())) else 0)
            ends = [paragraph.start() + match.end() for match in _END_OF_SENTENCE.finditer(paragraph.group())]
            for end in [*ends, paragraph.end()]:
                words = list(_WORD.finditer(self.text, start, end))
                if len(words) >= QUOTED_WORDS + LEAST_ANSWER_WORDS:
                    yield _Sentence(words[0].start(), [w.group() for w in words], [w.end() for w in words])
                start = end

    def quote(self, sentence: _Sentence, first: int, last: int) -> str:
        """Words `first` to `last` (exclusive) of a sentence, with the white space of the flat text."""
        start = sentence.start if first == 0 else sentence.stops[first - 1]
        return _flat(self.text[start : sentence.stops[last - 1]])


def _continue(text: RecallText, rng: random.Random) -> Recalled | None:
    if not text.sentences:
        return None
    sentence = rng.choice(text.sentences)
    stop = min(QUOTED_WORDS + ANSWER_WORDS, len(sentence.words))
    quote, answer = text.quote(sentence, 0, QUOTED_WORDS), text.quote(sentence, QUOTED_WORDS, stop)
    if not text.is_unique(quote):
        return None
    asked = Asked(f'How does the text go on after "{quote}"?', answer, "continue")
    return Recalled(asked, ((sentence.start, sentence.stops[stop - 1]),))


def _fill(text: RecallText, rng: random.Random) -> Recalled | None:
    if not text.sentences:
        return None
    sentence = rng.choice(text.sentences)
    place = rng.randrange(2, len(sentence.words) - 1)
    first, last = max(0, place - AROUND_WORDS), min(len(sentence.words), place + 1 + AROUND_WORDS)
    before, after = text.quote(sentence, first, place), text.quote(sentence, place + 1, last)
    around = text.quote(sentence, first, last)
    hidden = re.search(r"\w(?:.*\w)?", around[len(before) : len(around) - len(after)])
    if hidden is None or not _is_worth_hiding(hidden.group()):
        return None
    start = len(before) + hidden.start()
    shown = around[:start], around[start + len(hidden.group()) :]
    # Another word between the same words would be another answer.
    same = re.findall(rf"{re.escape(shown[0])}\S+?{re.escape(shown[1])}", text.flat)
    if len(same) != 1:
        return None
    what = "number" if hidden.group().isdigit() else "word"
    asked = Asked(f'Which {what} is missing in "{shown[0]}{_MISSING}{shown[1]}"?', hidden.group(), "fill")
    return Recalled(asked, ((sentence.start, sentence.stops[last - 1]),))


def _heading(text: RecallText, rng: random.Random) -> Recalled | None:
    if not text.headings:
        return None
    match = rng.choice(text.headings)
    paragraph = _PARAGRAPH.search(text.text, match.end())
    if paragraph is None or any(paragraph.start() == other.start() for other in text.headings):
        return None
    end = _END_OF_SENTENCE.search(text.text, paragraph.start(), paragraph.end())
    words = list(_WORD.finditer(text.text, paragraph.start(), end.start() if end else paragraph.end()))[:ANSWER_WORDS]
    if len(words) < LEAST_ANSWER_WORDS:
        return None
    answer = _flat(text.text[words[0].start() : words[-1].end()])
    asked = Asked(f'What follows the heading "{_title(match)}"?', answer, "heading")
    return Recalled(asked, ((match.start(), words[-1].end()),))


def _order(text: RecallText, rng: random.Random) -> Recalled | None:
    if len(text.sentences) < 2:
        return None
    earlier, later = sorted(rng.sample(text.sentences, 2), key=lambda sentence: sentence.start)
    quotes = [text.quote(sentence, 0, QUOTED_WORDS) for sentence in (earlier, later)]
    if not all(text.is_unique(quote) for quote in quotes):
        return None
    first, second = rng.sample(quotes, 2)
    asked = Asked(f'Which comes first in the text, "{first}" or "{second}"?', quotes[0], "order")
    return Recalled(asked, tuple((s.start, s.stops[QUOTED_WORDS - 1]) for s in (earlier, later)))


_DRAW: dict[str, Callable[[RecallText, random.Random], Recalled | None]] = {
    "continue": _continue,
    "fill": _fill,
    "heading": _heading,
    "order": _order,
}


def _title(heading: re.Match) -> str:
    return _flat(next(title for title in heading.groups() if title is not None))


def _is_worth_hiding(word: str) -> bool:
    """True for numbers and for words that are not short ones, which occur in every sentence."""
    if word.isdigit():
        return True
    least = 1 if re.match(rf"[{_UNSPACED}]", word) else LEAST_HIDDEN_CHARACTERS
    return least <= len(word) <= MOST_HIDDEN_CHARACTERS


def _flat(text: str) -> str:
    """Replaces all white space by single spaces."""
    return " ".join(text.split())
