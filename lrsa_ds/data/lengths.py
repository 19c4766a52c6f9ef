"""Token counts of texts that become parts of longer ones."""

import numpy as np

from lrsa_ds.data.shorten import token_ends
from lrsa_ds.data.tokenizer import Tokenizer

# Assumed to follow a text: most tokenizers split white space at the end of a text differently than before a word.
_NEXT = "The"


def token_counts(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Tokens of each text by itself, without special tokens."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids] if texts else []


class TokenCounts:
    """Counts and shortens texts by tokens; picklable."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._next = len(self._ids([_NEXT])[0])

    def count(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text if another word follows it: int64 [texts]. They add up, except for a token or two."""
        found = self._ids([f"{text}{_NEXT}" for text in texts]) if texts else []
        return np.array([len(ids) - self._next for ids in found], dtype=np.int64)

    def beginning(self, text: str, room: int) -> str:
        """The longest beginning of `text`, in complete words, that has at most `room` tokens."""
        ends = token_ends(self.tokenizer, text)
        if len(ends) <= room:
            return text
        stop = int(ends[room - 1]) if room > 0 else 0
        while stop > 0 and not (text[stop].isspace() or text[stop - 1].isspace()):
            stop -= 1
        return text[:stop]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
