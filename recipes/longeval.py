"""The tasks of the evaluation under a compressed cache: questions about a long text, and their metrics.

Needles, variable tracking and common words follow the definitions of RULER (arXiv 2404.06654), the 64-digit passkey
that of LagKV (arXiv 2504.04704); the sentences are our own, and the text around them is real. So scores are comparable
within one evaluation, not with published tables. Sample i of a task and length is a function of the seed alone.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.facts import PASSKEY_QUESTION, draw_passkey, number_fact, number_question
from lrsa_ds.data.haystack import Haystack
from lrsa_ds.data.stdlib_qa import StdlibQA
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.evaluator import Sample

MARGIN = 16  # tokens by which joined texts may differ from the sum of their parts
ANSWER_MARGIN = 16  # extra tokens for an answer: white space, a full stop, the end of the turn
PASSKEY_DIGITS = 64
NUM_KEYS = 4  # number of needles; the question is about one of them
NUM_HOPS = 4  # assignments after the first in a chain of variables
NUM_COMMON = 10
# Occurrences of a common and of any other word in the list (RULER), if the length has room for them.
COMMON_TIMES, OTHER_TIMES = 30, 3


@dataclass(frozen=True)
class Question:
    """A question, all parts of its answer, and the facts that give the answer, each with its depth.

    `context(room)` makes the context instead of the haystack with the facts.
    """

    question: str
    answers: list[str]
    facts: list[tuple[str, float]]
    context: Callable[[int], str] | None = None


@dataclass(frozen=True)
class Task:
    """`ask(depth, haystack, rng)` draws a question; the first metric is the main one."""

    ask: Callable[[float, Haystack, random.Random], Question]
    metrics: tuple[str, ...]
    has_depth: bool = False


def ask_passkey(depth: float, haystack: Haystack, rng: random.Random) -> Question:
    key, fact = draw_passkey(PASSKEY_DIGITS, rng)
    return Question(PASSKEY_QUESTION, [key], [(fact, depth)])


def ask_needle(depth: float, haystack: Haystack, rng: random.Random, num_keys: int = 1) -> Question:
    keys = rng.sample(haystack.words, num_keys)
    values = rng.sample(range(10**6, 10**7), num_keys)
    depths = [depth, *(rng.random() for _ in keys[1:])]
    facts = [(number_fact(key, value), place) for key, value, place in zip(keys, values, depths, strict=True)]
    return Question(number_question(keys[0]), [str(values[0])], facts)


def ask_needle_multikey(depth: float, haystack: Haystack, rng: random.Random) -> Question:
    return ask_needle(depth, haystack, rng, NUM_KEYS)


def ask_variable_tracking(depth: float, haystack: Haystack, rng: random.Random) -> Question:
    """A chain of assignments in the order of the text: a value, and variables that get it from one another."""
    names: set[str] = set()
    while len(names) <= NUM_HOPS:
        names.add("".join(rng.choices(string.ascii_uppercase, k=5)))
    chain = rng.sample(sorted(names), len(names))
    value = rng.randrange(10**4, 10**5)
    sources = [str(value), *chain]
    lines = [f"Assignment: {name} = {source}.\n\n" for name, source in zip(chain, sources, strict=False)]
    question = (
        f"Some of the assignments in the text give the value {value} to a variable, directly or through other "
        f"variables. Which are the {len(chain)} variables that have this value? Give their names, separated by commas."
    )
    return Question(question, chain, list(zip(lines, sorted(rng.random() for _ in lines), strict=True)))


def ask_common_words(depth: float, haystack: Haystack, rng: random.Random) -> Question:
    words = rng.sample(haystack.words, len(haystack.words))
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]

    def numbered_list(room: int) -> str:
        num_entries = room // max(haystack.count([f" 10000. {word}" for word in words]))
        # As often as in RULER, or less often if half of the list has no room for it.
        common_times = max(2, min(COMMON_TIMES, num_entries // (2 * NUM_COMMON)))
        other_times = max(1, common_times * OTHER_TIMES // COMMON_TIMES)
        num_others = max(0, num_entries - NUM_COMMON * common_times) // other_times
        listed = common * common_times + others[:num_others] * other_times
        rng.shuffle(listed)
        return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))

    question = f"Which {NUM_COMMON} words stand most often in the numbered list? Give them separated by commas."
    return Question(question, common, [], numbered_list)


GENERATED: dict[str, Task] = {
    "passkey": Task(ask_passkey, ("partial", "recall"), has_depth=True),
    "needle": Task(ask_needle, ("recall",), has_depth=True),
    "needle_multikey": Task(ask_needle_multikey, ("recall",), has_depth=True),
    "variable_tracking": Task(ask_variable_tracking, ("recall",)),
    "common_words": Task(ask_common_words, ("recall",)),
}


class GeneratedSamples:
    """Samples of the generated tasks, for one tokenizer and seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int, num_depths: int, chat_template: bool = True):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.seed = seed
        self.num_depths = num_depths
        self.haystack = Haystack(tokenizer)
        self.signatures = lru_cache(self._signatures)

    def sample(self, task: str, length: int, index: int) -> Sample:
        """A prompt with at most `length` tokens including its answer.

        Raises:
            LRSAError: `length` is too short for this task.
        """
        if task == "perplexity":
            return self._text(length, index)
        if task == "signature":
            return self._signature(length, index)
        depth = (index % self.num_depths) / max(1, self.num_depths - 1)
        encoder, margin = self._encoder(length), MARGIN
        while True:
            rng = random.Random(f"{task} {self.seed} {length} {index}")
            question = GENERATED[task].ask(depth, self.haystack, rng)
            row = {"context": "", "question": question.question, "answer": ", ".join(question.answers), "task": task}
            room = length - encoder.length(row) - ANSWER_MARGIN - margin
            missing = MARGIN + sum(self.haystack.count([text for text, _ in question.facts])) - room
            if missing > 0:
                raise LRSAError(f"lengths={length} is too short for the task {task}: give at least {length + missing}.")
            if question.context is None:
                row["context"] = self.haystack.text(room, question.facts, rng)
            else:
                row["context"] = question.context(room)
            excess = encoder.length(row) + ANSWER_MARGIN - length
            if excess <= 0:
                settings = GENERATED[task]
                identity = dict(task=task, index=index, length=length, depth=depth if settings.has_depth else None)
                return to_sample(encoder, row, question.answers, settings.metrics, **identity)
            margin += excess

    def _encoder(self, length: int) -> Encoder:
        return Encoder(self.tokenizer, length, self.chat_template)

    def _signature(self, length: int, index: int) -> Sample:
        encoder = self._encoder(length)
        row = self.signatures(length).row(0, index, "signature")
        identity = dict(task="signature", index=index, length=length)
        return to_sample(encoder, row, [row["answer"]], ("exact", "f1"), **identity)

    def _signatures(self, length: int) -> StdlibQA:
        encoder = self._encoder(length)
        return StdlibQA("validation", self.seed, ["signature"], length, self.tokenizer, encoder.length)

    def _text(self, length: int, index: int) -> Sample:
        rng = random.Random(f"perplexity {self.seed} {length} {index}")
        text = self.haystack.text(length + length // 4 + 2000, [], rng)
        ids = self._encoder(length).examples({"text": text})[0].input_ids
        return Sample("perplexity", index, length, tuple(ids), (), ("nll",), 0)


def to_sample(encoder: Encoder, row: dict, answers: list[str], metrics: tuple[str, ...], **identity) -> Sample:
    """The prompt of a row: the input before its last answer. A context that is too long is cut."""
    prompt = encoder.prompt(row)
    return Sample(
        prompt_ids=tuple(prompt.ids), answers=tuple(answers), metrics=metrics,
        max_new_tokens=len(prompt.answer_ids) + ANSWER_MARGIN, lead_end=prompt.lead_end,
        answer_ids=tuple(prompt.answer_ids), **identity,
    )  # fmt: skip
