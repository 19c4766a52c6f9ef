"""Real text of any length, with facts hidden at chosen depths: documentation of the standard library."""

import random
from collections.abc import Iterator

from lrsa_ds.data.facts import plain_words
from lrsa_ds.data.lengths import token_counts
from lrsa_ds.data.stdlib_docs import load_documents
from lrsa_ds.data.tokenizer import Tokenizer


class Haystack:
    """Paragraphs of the validation documents, on which no model was trained, with their lengths in tokens.

    Args:
        tokenizer: counts the tokens of each paragraph once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        documents = [d for d in load_documents() if d.is_validation]
        self.documents = [[f"{part.strip()}\n\n" for part in d.text.split("\n\n") if part.strip()] for d in documents]
        self.lengths = [self.count(parts) for parts in self.documents]
        self.words = plain_words(document.name for document in documents)

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        return token_counts(self.tokenizer, texts)

    def text(self, room: int, facts: list[tuple[str, float]], rng: random.Random) -> str:
        """Complete paragraphs of at most about `room` tokens, with the facts between them.

        Args:
            facts: each with its depth: 0 is before all paragraphs, 1 after all of them.
        """
        room -= sum(self.count([text for text, _ in facts]))
        parts, ends, total = [], [], 0
        for part, length in self._paragraphs(rng):
            if total + length > room:
                break
            parts.append(part)
            total += length
            ends.append(total)
        placed = list(parts)
        # The deepest fact first, so that the places of the others do not change.
        for text, depth in sorted(facts, key=lambda fact: -fact[1]):
            place = sum(end <= depth * total for end in ends)
            placed.insert(place, text)
        return "".join(placed).rstrip()

    def _paragraphs(self, rng: random.Random) -> Iterator[tuple[str, int]]:
        """Paragraphs of all documents in random order, repeated: very long contexts need more than there are."""
        while True:
            for i in rng.sample(range(len(self.documents)), len(self.documents)):
                yield from zip(self.documents[i], self.lengths[i], strict=True)
