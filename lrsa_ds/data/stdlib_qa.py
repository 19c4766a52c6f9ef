"""Generated long-context questions over the documentation of the standard library.

A context consists of randomly drawn documents; the answer to each question is in one of them. Modules of the validation
split are never used in training. Example i is a pure function of (split, seed, epoch, i).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from lrsa_ds.data.contexts import MARGIN, Asked, asked_row
from lrsa_ds.data.facts import PASSKEY_QUESTION, draw_passkey, number_fact, number_question, plain_words
from lrsa_ds.data.lengths import TokenCounts, token_counts
from lrsa_ds.data.stdlib_docs import Document, documents_fingerprint, load_documents
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError

PASSKEY_DIGITS = 32
NUM_LOOKUP_KEYS = 16
MIN_LOOKUP_KEYS = 2
# Signature questions need a context length that this many of them fit.
_MIN_SIGNATURES = 32
# "()" and "(x)" can be guessed: they are not asked for.
_MIN_SIGNATURE_CHARACTERS = 7


@dataclass(frozen=True, slots=True)
class _Question:
    """`facts` are in the context uncut; `detail` may follow the first fact and may be cut."""

    asked: Asked
    facts: list[str]
    detail: str = ""
    name: str | None = None


class StdlibQA:
    """Rows of the tasks `signature`, `passkey` and `lookup`, for one split; picklable.

    Args:
        split: "train" or "validation".
        seed: determines an example, together with the split, the epoch and the index.
        tasks: the tasks that training draws from, uniformly.
        context_length: maximum tokens of a complete example: template, context, question and answer.
        tokenizer: counts the tokens of each document once.
        frame_length: the number of tokens of a canonical row when it is encoded.
        num_examples: contexts of an epoch.
        questions_per_context: questions over one context, as turns of a conversation; at most one asks for the pass
            key.

    Raises:
        LRSAError: `context_length` is too short for questions of a task, or for `questions_per_context` questions.
    """

    def __init__(
        self,
        split: str,
        seed: int,
        tasks: list[str],
        context_length: int,
        tokenizer: Tokenizer,
        frame_length: Callable[[dict[str, Any]], int],
        num_examples: int = 1,
        questions_per_context: int = 1,
    ):
        self.num_examples, self.questions_per_context = num_examples, questions_per_context
        self.split = split
        self.seed = seed
        self.tasks = list(tasks)
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.frame_length = frame_length
        self.documents = [d for d in load_documents() if d.is_validation == (split == "validation")]
        self.lengths: list[int] = TokenCounts(tokenizer).count([d.text for d in self.documents]).tolist()
        self.words = plain_words(d.name for d in self.documents)
        self.signatures: list[Document] = []
        minimum = max(self._minimum_length(task) for task in dict.fromkeys(self.tasks))
        if context_length < minimum:
            raise LRSAError(
                f"seq_len (and data.context_length where it is set) leaves {context_length} tokens for an example, "
                f"too few for a question of data.tasks={self.tasks}: give at least {minimum}."
            )
        if questions_per_context > 1:
            self._check_number_of_questions()

    def num_contexts(self, epoch: int) -> int:
        return self.num_examples

    def scored(self, num_examples: int) -> list[tuple[int, str]]:
        return [(index, task) for task in dict.fromkeys(self.tasks) for index in range(num_examples)]

    def fingerprint(self) -> str:
        return f"{self.num_examples} questions over {documents_fingerprint()}"

    def row(self, epoch: int, index: int, task: str | None = None, margin: int = MARGIN) -> dict[str, Any]:
        """Example `index`: `{context, question, answer, task}`, or a conversation of several questions.

        Args:
            epoch: of training; 0 for validation.
            index: any number from 0.
            task: the task, or None for random ones of `tasks`.
            margin: tokens of `context_length` to leave free.
        """
        rng = random.Random(f"{self.split} {self.seed} {epoch} {index} {task}")
        if self.questions_per_context == 1:
            questions = [self._draw(task or rng.choice(self.tasks), rng)]
        else:
            questions = self._draw_several(task, rng)
        room = self._room(questions) - margin
        while len(questions) > 1 and self._needed(questions) > room:
            del questions[-1]
            room = self._room(questions) - margin
        context = self._context([self._fewer_keys(question, room) for question in questions], room, rng)
        return asked_row(context, [question.asked for question in questions])

    def _room(self, questions: list[_Question]) -> int:
        return self.context_length - self.frame_length(asked_row("", [question.asked for question in questions]))

    def _needed(self, questions: list[_Question]) -> int:
        return sum(self._count([fact for question in questions for fact in question.facts]))

    def _draw(self, task: str, rng: random.Random) -> _Question:
        if task == "signature":
            return _signature_question(rng.choice(self.signatures))
        if task == "passkey":
            key, fact = draw_passkey(PASSKEY_DIGITS, rng)
            return _Question(Asked(PASSKEY_QUESTION, key, task), [fact])
        # The question is about the first fact: its place in the context is drawn later, and it is dropped last.
        asked, facts = self._draw_lookups(NUM_LOOKUP_KEYS, rng)
        return _Question(asked[0], facts)

    def _draw_lookups(self, num_keys: int, rng: random.Random) -> tuple[list[Asked], list[str]]:
        """A question for each of `num_keys` keys, and the facts that answer them."""
        words = rng.sample(self.words, num_keys)
        numbers = [str(rng.randrange(10**6, 10**7)) for _ in words]
        facts = [number_fact(word, number) for word, number in zip(words, numbers, strict=True)]
        pairs = zip(words, numbers, strict=True)
        return [Asked(number_question(word), number, "lookup") for word, number in pairs], facts

    def _draw_several(self, task: str | None, rng: random.Random) -> list[_Question]:
        """`questions_per_context` different questions in random order, at most one of them for the pass key."""
        tasks: list[str] = []
        others = [other for other in self.tasks if other != "passkey"]
        for _ in range(1 if task == "passkey" else self.questions_per_context):
            tasks.append(task or rng.choice(others if "passkey" in tasks else self.tasks))
        asked_about = rng.sample(self.signatures, tasks.count("signature")) if "signature" in tasks else []
        questions = [_signature_question(document) for document in asked_about]
        if num_lookups := tasks.count("lookup"):
            lookups, facts = self._draw_lookups(max(NUM_LOOKUP_KEYS, num_lookups), rng)
            of_lookup = zip(lookups[:num_lookups], facts[:num_lookups], strict=True)
            questions += [_Question(asked, [fact]) for asked, fact in of_lookup]
            # Facts that no question asks for go with the last question.
            questions[-1].facts.extend(facts[num_lookups:])
        if "passkey" in tasks:
            questions.append(self._draw("passkey", rng))
        rng.shuffle(questions)
        return questions

    def _fewer_keys(self, question: _Question, room: int) -> _Question:
        """As many of the facts of a lookup as fit, and at least two."""
        if question.asked.task != "lookup" or len(question.facts) < MIN_LOOKUP_KEYS:
            return question
        fitting = sum(total <= room for total in accumulate(self._count(question.facts)))
        return replace(question, facts=question.facts[: max(fitting, MIN_LOOKUP_KEYS)])

    def _context(self, questions: list[_Question], room: int, rng: random.Random) -> str:
        """Documents that fill `room` tokens, with the facts of the questions at random places."""
        facts = [fact for question in questions for fact in question.facts]
        room -= sum(self._count(facts))
        detailed = [question for question in questions if question.detail]
        for number, question in enumerate(detailed):
            # Each question may use an equal share of the remaining room.
            detail, used = self._prefix(question.detail, room // (len(detailed) - number))
            facts[facts.index(question.facts[0])] += detail
            room -= used
        names = {question.name for question in questions}
        parts: list[str] = []
        # The end is filled with first lines of documents; several are tried, since the first line may be too long.
        tries_left = 3
        for i in self._endless_order(rng):
            if self.documents[i].name in names:
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
        """All documents in random order, repeated: very long contexts need more than there are."""
        while True:
            yield from rng.sample(range(len(self.documents)), len(self.documents))

    def _prefix(self, text: str, room: int) -> tuple[str, int]:
        """The longest run of first lines that fits `room` tokens, and its number of tokens."""
        lines = text.splitlines(keepends=True)
        totals = [total for total in accumulate(self._count(lines)) if total <= room]
        return "".join(lines[: len(totals)]), totals[-1] if totals else 0

    def _count(self, texts: list[str]) -> list[int]:
        return token_counts(self.tokenizer, texts)

    def _check_number_of_questions(self) -> None:
        key = f"data.questions_per_context={self.questions_per_context}"
        if set(self.tasks) == {"passkey"}:
            raise LRSAError(f"{key}: a context holds one pass key; add signature or lookup to data.tasks.")
        if self.questions_per_context > min(len(self.signatures) or len(self.words), len(self.words)):
            raise LRSAError(f"{key} is more than there are questions: give at most {len(self.words)}.")
        drawn = [self._draw_several(None, random.Random(number)) for number in range(8)]
        needed = max(self.context_length - self._room(asked) + self._needed(asked) for asked in drawn) + 2 * MARGIN
        if needed > self.context_length:
            raise LRSAError(
                f"{key} is more than fits: they need {needed} tokens, and seq_len (and data.context_length where it is "
                f"set) leaves {self.context_length}."
            )

    def _minimum_length(self, task: str) -> int:
        """Tokens that an example of this task needs. For signatures, also sets `self.signatures` to those that fit."""
        if task != "signature":
            rng = random.Random(0)
            return max(self._length_without_documents(self._draw(task, rng)) for _ in range(8)) + 2 * MARGIN
        asked = [d for d in self.documents if d.signature and len(d.signature) >= _MIN_SIGNATURE_CHARACTERS]
        # The template is the same for all questions, so the rest is counted for all of them together.
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

    def _length_without_documents(self, question: _Question) -> int:
        return self.frame_length(asked_row("", [question.asked])) + sum(self._count(question.facts[:MIN_LOOKUP_KEYS]))


def _signature_question(document: Document) -> _Question:
    assert document.signature is not None
    question = f"What is the signature of {document.name}?"
    detail = document.text[len(document.header) :]
    return _Question(Asked(question, document.signature, "signature"), [document.header], detail, document.name)
