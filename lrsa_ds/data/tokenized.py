"""Rows that are tokenized already: checked against the vocabulary, and cut to the length of a sequence."""

from typing import Any

from lrsa_ds.data.cutting import TooLong, kept_parts
from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.errors import LRSAError


def tokenized_examples(
    row: dict[str, Any], index: int, seq_len: int, num_tokens: int, may_cut: bool = True
) -> list[Example]:
    """The examples of a canonical row with `input_ids` and `labels`; see `lrsa_ds.data.shapes`.

    A row longer than `seq_len` is split into pieces if every token is trained on, as plain text is. Other rows lose
    tokens from the middle of their longest run of tokens without a target.

    Args:
        num_tokens: the size of the vocabulary.
        may_cut: False refuses rows that would have to be cut.

    Raises:
        LRSAError: a token is not in the vocabulary, or the row is too long even without that run.
        TooLong: the row would have to be cut, and `may_cut` is False.
    """
    ids, labels = row["input_ids"], row["labels"]
    if max(ids) >= num_tokens:
        raise LRSAError(f"input_ids has the token {max(ids)}, and the tokenizer only those below {num_tokens}.")
    if len(ids) <= seq_len:
        return [_example(ids, labels, row, index)]
    if IGNORE not in labels[1:]:
        pieces = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
        # A single token has no target.
        return [_example(piece, piece, row, index) for piece in pieces if len(piece) > 1]
    if not may_cut:
        raise TooLong.of(len(ids), seq_len)
    run = _longest_without_target(labels)
    room = len(run) - (len(ids) - seq_len)
    if room < 0:
        raise LRSAError(
            f"without its longest run of tokens that are not trained on it still has {len(ids) - len(run)} tokens, "
            f"more than seq_len={seq_len}: raise seq_len or leave the row out."
        )
    kept = [run.start + i for part in kept_parts(len(run), room) for i in part]
    places = [*range(run.start), *kept, *range(run.stop, len(ids))]
    num_cut = len(ids) - len(places)
    return [_example([ids[i] for i in places], [labels[i] for i in places], row, index, num_cut)]


def _example(ids: list[int], labels: list[int], row: dict[str, Any], index: int, num_cut: int = 0) -> Example:
    return Example(list(ids), [IGNORE, *labels[1:]], row["task"], index, num_cut=num_cut)


def _longest_without_target(labels: list[int]) -> range:
    longest, start = range(0), 0
    for place, label in enumerate([*labels, 0]):
        if label != IGNORE:
            longest = max(longest, range(start, place), key=len)
            start = place + 1
    return longest
