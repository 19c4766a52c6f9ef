"""Shortening a text to a number of tokens.

The text is cut, not its tokens: the rest is rendered and tokenized again. So the tokens at a cut are those that
inference would see for the shortened text.
"""

from collections.abc import Iterable

import numpy as np

from lrsa_ds.data.tokenizer import Tokenizer


def token_ends(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The end of each token of `text` in characters: [tokens], ascending. Slow tokenizers: as if of equal length."""
    options = {"add_special_tokens": False, "verbose": False}
    if not tokenizer.is_fast:
        num_tokens = len(tokenizer(text, **options).input_ids)
        return np.linspace(0, len(text), num_tokens + 1).astype(int)[1:]
    offsets = tokenizer(text, return_offsets_mapping=True, **options).offset_mapping
    return np.maximum.accumulate(np.array([stop for _, stop in offsets], dtype=int))


def shortened(text: str, ends: np.ndarray, parts: Iterable[range]) -> str:
    """The characters of some tokens of `text`.

    Args:
        ends: from `token_ends`.
        parts: the tokens to keep, in ascending order.
    """
    # A token extends from the end of the previous one to its own end; the last token to the end of the text.
    stops = [0, *ends[:-1].tolist(), len(text)]
    return "".join(text[stops[part.start] : stops[part.stop]] for part in parts)


def tokens_of(ends: np.ndarray, characters: tuple[int, int]) -> range:
    """The tokens that cover these characters."""
    first, last = np.searchsorted(ends, [characters[0] + 1, characters[1]])
    return range(int(first), int(last) + 1)
