"""The answers of a packed row: the positions that predict them, and the places of their words in the context."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from lrsa_ds.data.packing import IGNORE, PackedSequence
from lrsa_ds.data.tokenizer import Tokenizer

# How tokens represent white space: in byte-level BPE, and in SentencePiece.
_SPACES = str.maketrans({"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "▁": " "})


@dataclass(frozen=True)
class Answer:
    """One run of target tokens. All numbers are positions in the row.

    Args:
        start: the first token of its document.
        first, end: the positions [first, end) predict its tokens.
        places: tokens up to `first` that spell the answer, wherever it occurs; none if it does not occur.
    """

    start: int
    first: int
    end: int
    places: tuple[int, ...]


def find_answers(row: PackedSequence, tokenizer: Tokenizer) -> list[Answer]:
    """All answers of a row, in order."""
    apart = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids, labels = row.input_ids.tolist(), row.labels.tolist()
    found = []
    for start, length in zip(accumulate(row.document_lengths, initial=0), row.document_lengths, strict=False):
        document = range(start, start + length)
        runs = [list(places) for is_target, places in groupby(document, lambda t: labels[t] != IGNORE) if is_target]
        spelled = tokenizer.convert_ids_to_tokens(ids[start : start + length]) if runs else []
        for run in runs:
            pieces = groupby(range(run[0] + 1, run[-1] + 2), lambda t: ids[t] in apart)
            piece = max((list(tokens) for is_apart, tokens in pieces if not is_apart), key=len, default=[])
            answer = [spelled[t - start] for t in piece]
            places = spelling(answer, spelled[: run[0] + 1 - start])
            found.append(Answer(start, run[0], run[-1] + 1, tuple(start + place for place in places)))
    return found


def spelling(answer: Sequence[str], context: Sequence[str]) -> list[int]:
    """Which tokens of the context spell the answer, however context and answer are split into tokens.

    White space around the answer is ignored, and a match may not be part of a longer word.
    """
    wanted, text = ("".join(tokens).translate(_SPACES) for tokens in (answer, context))
    wanted = wanted.strip()
    starts = list(accumulate(map(len, context), initial=0))[:-1]
    found: set[int] = set()
    at = text.find(wanted) if wanted else -1
    while at >= 0:
        end = at + len(wanted)
        if not (_is_one_word(text[at - 1 : at + 1]) or _is_one_word(text[end - 1 : end + 1])):
            found.update(range(bisect_right(starts, at) - 1, bisect_left(starts, end)))
        at = text.find(wanted, at + 1)
    return sorted(found)


def _is_one_word(pair: str) -> bool:
    """Whether two adjacent characters belong to one word; ASCII only: tokens spell other letters in bytes."""
    return len(pair) == 2 and all(c.isascii() and c.isalnum() for c in pair)
