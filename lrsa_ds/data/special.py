"""The special tokens of a tokenizer in text: which of them end a turn, and where a text may be split."""

import re

from lrsa_ds.data.tokenizer import Tokenizer

# A generation prompt, or the text between two turns, is shorter than this: no more of a prompt is searched.
SEARCHED_CHARACTERS = 4096


class SpecialTokens:
    """Finds added tokens in text.

    A tokenizer finds its added tokens first and tokenizes the text between them separately. So a text that is split
    where a *border* token begins has the same tokens as the complete text. A border is an added token that neither
    strips the white space before it nor depends on a normalizer; slow tokenizers guarantee none.
    """

    def __init__(self, tokenizer: Tokenizer):
        added = list(tokenizer.added_tokens_decoder.values())
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(special)
        self._added = _any_of({token.content for token in added} - special)
        normalizes = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is not None
        borders = [t.content for t in added if not (t.lstrip or t.single_word or (t.normalized and normalizes))]
        self._borders = frozenset(borders if tokenizer.is_fast else ())
        self._border = _any_of(self._borders)

    def first(self, text: str) -> re.Match | None:
        """The first special token of `text`, or else the first other added token."""
        return self._special.search(text) or self._added.search(text)

    def last(self, text: str) -> re.Match | None:
        """The last special token of `text`."""
        return max(self._special.finditer(text), key=re.Match.start, default=None)

    def is_border(self, token: str) -> bool:
        return token in self._borders

    def last_border(self, text: str, start: int, stop: int) -> int | None:
        """Where the last border of `text[start:stop]` begins; only the last `SEARCHED_CHARACTERS` are searched."""
        found = self._border.finditer(text, max(start, stop - SEARCHED_CHARACTERS), stop)
        return max(map(re.Match.start, found), default=None)


def _any_of(tokens: set[str] | frozenset[str]) -> re.Pattern:
    """Matches the longest token first, as tokenizers do. Blank tokens, which stand for runs of spaces, are left out."""
    visible = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, visible)) or r"(?!)")
