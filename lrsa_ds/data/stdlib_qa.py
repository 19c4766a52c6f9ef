"""Long-context questions over the standard library's documentation, generated on the fly.

Every context is made of randomly drawn documents; what a question asks for is stated somewhere among them. Modules of
the validation split are never seen in training. Example i is a pure function of (split, seed, epoch, i).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lrsa_ds.data.facts import PASSKEY_QUESTION, draw_passkey, number_fact, number_question, plain_words
from lrsa_ds.data.stdlib_docs import Document, load_documents
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError

PASSKEY_DIGITS = 32
NUM_LOOKUP_KEYS = 16
MIN_LOOKUP_KEYS = 2
# Room for what the tokens of joined texts may differ from the sum of their parts.
MARGIN = 16
# A context length serves signature questions if at least this many of them fit.
_MIN_SIGNATURES = 32
# "()" and "(x)" can be guessed; they are no question.
_MIN_SIGNATURE_CHARACTERS = 7


@dataclass(frozen=True, slots=True)
class _Question:
    """`facts` have to stand in the context uncut; `detail` may follow the first of them and may be cut."""

    question: str
    answer: str
    facts: list[str]
    detail: str = ""
    name: str | None = None


class StdlibQA:
    """Rows of the tasks `signature`, `passkey` and `lookup`, for one split; picklable.

    Args:
        split: "train" or "validation".
        seed: with the split, the epoch and the index it determines an example.
        tasks: what training draws from, uniformly.
        context_length: tokens that a whole example may have: template, context, question and answer.
        tokenizer: counts the tokens of documents, once each.
        frame_length: the number of tokens of a row `{context, question, answer, task}` when it is encoded.

    Raises:
        LRSAError: `context_length` holds too few questions of a task.
    """

    def __init__(
        self,
        split: str,
        seed: int,
        tasks: list[str],
        context_length: int,
        tokenizer: Tokenizer,
        frame_length: Callable[[dict[str, Any]], int],
    ):
        self.split = split
        self.seed = seed
        self.tasks = list(tasks)
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.frame_length = frame_length
        self.documents = [d for d in load_documents() if d.is_validation == (split == "validation")]
        self.lengths = self._count([d.text for d in self.documents])
        self.words = plain_words(d.name for d in self.documents)
        self.signatures: list[Document] = []
        minimum = max(self._minimum_length(task) for task in dict.fromkeys(self.tasks))
        if context_length < minimum:
            raise LRSAError(
                f"seq_len (and data.context_length where it is set) leaves {context_length} tokens for an example, "
                f"too few for a question of data.tasks={self.tasks}: give at least {minimum}."
            )

    def row(self, epoch: int, index: int, task: str | None = None, margin: int = MARGIN) -> dict[str, Any]:
        """`{context, question, answer, task}` of example `index`.

        Args:
            epoch: of training; 0 for validation.
            index: any number from 0.
            task: the task, or None for a random one of `tasks`.
            margin: tokens of `context_length` that the estimate leaves free.
        """
        rng = random.Random(f"{self.split} {self.seed} {epoch} {index} {task}")
        task = task or rng.choice(self.tasks)
        question = self._draw(task, rng)
        row = {"context": "", "question": question.question, "answer": question.answer, "task": task}
        room = self.context_length - self.frame_length(row) - margin
        if task == "lookup":
            question = self._fewer_keys(question, room)
        return {**row, "context": self._context(question, room, rng)}

    def _draw(self, task: str, rng: random.Random) -> _Question:
        if task == "signature":
            asked = rng.choice(self.signatures)
            assert asked.signature is not None
            question = f"What is the signature of {asked.name}?"
            return _Question(question, asked.signature, [asked.header], asked.text[len(asked.header) :], asked.name)
        if task == "passkey":
            key, fact = draw_passkey(PASSKEY_DIGITS, rng)
            return _Question(PASSKEY_QUESTION, key, [fact])
        words = rng.sample(self.words, NUM_LOOKUP_KEYS)
        numbers = [str(rng.randrange(10**6, 10**7)) for _ in words]
        facts = [number_fact(word, number) for word, number in zip(words, numbers, strict=True)]
        # The question asks for the first one: its place in the context is drawn later, and it is dropped last.
        return _Question(number_question(words[0]), numbers[0], facts)

    def _fewer_keys(self, question: _Question, room: int) -> _Question:
        """As many of the 16 facts as fit, and at least two."""
        fitting = sum(total <= room for total in accumulate(self._count(question.facts)))
        return _Question(question.question, question.answer, question.facts[: max(fitting, MIN_LOOKUP_KEYS)])

    def _context(self, question: _Question, room: int, rng: random.Random) -> str:
        """Documents that fill `room` tokens, the question's facts at random places among them."""
        facts = list(question.facts)
        room -= sum(self._count(facts))
        if question.detail:
            detail, used = self._prefix(question.detail, room)
            facts[0] += detail
            room -= used
        parts: list[str] = []
        # The last room is filled with the first lines of a document; of several, as the first may have a long one.
        tries_left = 3
        for i in self._endless_order(rng):
            if self.documents[i].name == question.name:
                continue
            part, used = self.documents[i].text, self.lengths[i]
            if used > room:
                part, used = self._prefix(part, room)
                tries_left -= 1
            parts.append(part)
            room -= used
            if tries_left == 0:
                break
        for fact in facts:
            parts.insert(rng.randrange(len(parts) + 1), fact)
        return "".join(parts).rstrip()

    def _endless_order(self, rng: random.Random) -> Iterator[int]:
        """All documents in random order, and again: very long contexts need more than there are."""
        while True:
            yield from rng.sample(range(len(self.documents)), len(self.documents))

    def _prefix(self, text: str, room: int) -> tuple[str, int]:
        """The longest run of first lines that fits into `room` tokens, and their number."""
        lines = text.splitlines(keepends=True)
        totals = [total for total in accumulate(self._count(lines)) if total <= room]
        return "".join(lines[: len(totals)]), totals[-1] if totals else 0

    def _count(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False).input_ids] if texts else []

    def _minimum_length(self, task: str) -> int:
        """Tokens that an example of this task needs; for signatures, also notes which of them fit."""
        if task != "signature":
            rng = random.Random(0)
            return max(self._length_without_documents(self._draw(task, rng), task) for _ in range(8)) + 2 * MARGIN
        asked = [d for d in self.documents if d.signature and len(d.signature) >= _MIN_SIGNATURE_CHARACTERS]
        # The template around them is the same for all: the rest is counted in one go.
        empty = self.frame_length({"context": "", "question": "?", "answer": "?", "task": task}) + 2 * MARGIN
        parts = zip(
            self._count([d.header for d in asked]),
            self._count([f"What is the signature of {d.name}?" for d in asked]),
            self._count([d.signature or "" for d in asked]),
            strict=True,
        )
        needed = [empty + sum(counts) for counts in parts]
        self.signatures = [d for d, length in zip(asked, needed, strict=True) if length <= self.context_length]
        return sorted(needed)[_MIN_SIGNATURES - 1]

    def _length_without_documents(self, question: _Question, task: str) -> int:
        row = {"context": "", "question": question.question, "answer": question.answer, "task": task}
        return self.frame_length(row) + sum(self._count(question.facts[:MIN_LOOKUP_KEYS]))
