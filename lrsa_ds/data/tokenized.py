"""Rows that are tokens already: checked against the vocabulary, and brought to the length of a sequence."""

from typing import Any

from lrsa_ds.data.cutting import TooLong, kept_parts
from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.errors import LRSAError


def tokenized_examples(
    row: dict[str, Any], index: int, seq_len: int, num_tokens: int, may_cut: bool = True
) -> list[Example]:
    """The examples of a canonical row with `input_ids` and `labels`; see `lrsa_ds.data.shapes`.

    A row that is longer than `seq_len` and trained on as a whole is cut into pieces, as plain text is. Of any other
    one, tokens are taken out of the middle of its longest stretch without a target.

    Args:
        num_tokens: the size of the vocabulary.
        may_cut: False refuses a row that would lose tokens.

    Raises:
        LRSAError: a token beyond the vocabulary, or a row that is too long even without that stretch.
        TooLong: a row that would be cut, and may not.
    """
    ids, labels = row["input_ids"], row["labels"]
    if max(ids) >= num_tokens:
        raise LRSAError(f"input_ids has the token {max(ids)}, and the tokenizer only those below {num_tokens}.")
    if len(ids) <= seq_len:
        return [_example(ids, labels, row, index)]
    if IGNORE not in labels[1:]:
        pieces = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
        # One token alone predicts nothing.
        return [_example(piece, piece, row, index) for piece in pieces if len(piece) > 1]
    if not may_cut:
        raise TooLong.of(len(ids), seq_len)
    stretch = _longest_without_target(labels)
    room = len(stretch) - (len(ids) - seq_len)
    if room < 0:
        raise LRSAError(
            f"without its longest stretch that is not learnt it still has {len(ids) - len(stretch)} tokens, more than "
            f"seq_len={seq_len}: raise seq_len or leave the row out."
        )
    kept = [stretch.start + i for part in kept_parts(len(stretch), room) for i in part]
    places = [*range(stretch.start), *kept, *range(stretch.stop, len(ids))]
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
