"""Facts that training and evaluation hide in long texts, each with its question."""

import random
import string
from collections.abc import Iterable

PASSKEY_QUESTION = "What is the pass key?"


def draw_passkey(num_digits: int, rng: random.Random) -> tuple[str, str]:
    """A random key, and sentences that state it."""
    key = "".join(rng.choices(string.digits, k=num_digits))
    return key, f"The pass key is {key}. Remember it. {key} is the pass key.\n\n"


def number_fact(word: str, number: str | int) -> str:
    return f"The special number for {word} is {number}.\n\n"


def number_question(word: str) -> str:
    return f"What is the special number for {word}?"


def plain_words(names: Iterable[str]) -> list[str]:
    """The last parts of dotted names that are words of 4 to 9 letters, sorted and unique."""
    words = {name.split(".")[-1] for name in names}
    return sorted(word for word in words if word.isascii() and word.isalpha() and 4 <= len(word) <= 9)
