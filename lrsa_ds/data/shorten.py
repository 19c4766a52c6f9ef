"""Shortening a text to a number of tokens.

It is the text that is shortened, not its tokens: what is left is rendered and tokenized anew. So the tokens at a seam
are those that inference would see if it were given the shortened text.
"""

from collections.abc import Iterable

import numpy as np

from lrsa_ds.data.tokenizer import Tokenizer


def token_ends(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The character behind each token of `text`, ascending: [tokens]. Without offsets, as if all were equally long."""
    options = {"add_special_tokens": False, "verbose": False}
    if not tokenizer.is_fast:
        num_tokens = len(tokenizer(text, **options).input_ids)
        return np.linspace(0, len(text), num_tokens + 1).astype(int)[1:]
    offsets = tokenizer(text, return_offsets_mapping=True, **options).offset_mapping
    return np.maximum.accumulate(np.array([stop for _, stop in offsets], dtype=int))


def shortened(text: str, ends: np.ndarray, parts: Iterable[range]) -> str:
    """The characters of some of the tokens of `text`.

    Args:
        ends: as `token_ends` gives them.
        parts: which tokens stay, in ascending order.
    """
    # A token reaches from the end of the one before it to its own end; the last one to the end of the text.
    stops = [0, *ends[:-1].tolist(), len(text)]
    return "".join(text[stops[part.start] : stops[part.stop]] for part in parts)


def tokens_of(ends: np.ndarray, characters: tuple[int, int]) -> range:
    """The tokens that hold characters of this stretch."""
    first, last = np.searchsorted(ends, [characters[0] + 1, characters[1]])
    return range(int(first), int(last) + 1)
