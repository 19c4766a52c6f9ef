"""Cases of benchmarks as samples: their prompts as tokens."""

import random
from collections import defaultdict
from collections.abc import Sequence

from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.tokenizer import Tokenizer, decoded
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.evaluator import Sample
from recipes.benchmarks import BENCHMARKS
from recipes.benchmarks.benchmark import Case

MIN_LEFT = 64  # minimum tokens of a prompt after cutting


def drawn_cases(
    key: str, path: str, lengths: Sequence[int], seed: int, num_samples: int
) -> dict[tuple[str, int], list[Case]]:
    """At most `num_samples` cases of each task and length, drawn by the seed.

    A case made for one length is asked only there; other cases are asked at each of `lengths`.

    Raises:
        LRSAError: no case belongs to any of `lengths`; the error names the existing lengths.
    """
    found: dict[tuple[str, int], list[Case]] = defaultdict(list)
    others: set[int] = set()
    for case in BENCHMARKS[key].read(path):
        if case.length is not None:
            others.add(case.length)
        for length in lengths:
            if case.length in (None, length):
                found[f"{key}/{case.task}", length].append(case)
    if not found:
        there = ",".join(map(str, sorted(others)))
        raise LRSAError(f"lengths={list(lengths)} are none of those of {key}={path!r}: give some of lengths=[{there}].")
    return {at: random.Random(seed).sample(cases, min(num_samples, len(cases))) for at, cases in found.items()}


class BenchmarkSamples:
    """Samples of drawn cases, by task and length."""

    def __init__(self, tokenizer: Tokenizer, cases: dict[tuple[str, int], list[Case]], chat_template: bool = True):
        self.tokenizer = tokenizer
        self.cases = cases
        # What opens a prompt: in a turn of the user, or the text alone. Nothing is cut here, so no length matters.
        self.encoders = {in_turn: Encoder(tokenizer, 1, chat_template and in_turn) for in_turn in (True, False)}

    def sample(self, task: str, length: int, index: int) -> Sample:
        """The prompt of a case; with the limit of its answer it takes at most `length` tokens, unless made for them.

        Raises:
            LRSAError: it does not fit and may not be cut, or it stands in a chat template already.
        """
        case = self.cases[task, length][index]
        ids = self._prompt(case, f"{task}, sample {index}")
        excess = len(ids) + case.max_new_tokens - length
        if excess > 0 and case.may_be_cut:
            ids = self._cut_prompt(case, task, length)
        elif excess > 0 and case.length is None:
            raise LRSAError(
                f"lengths={length} is too short for {task}, whose facts may not be cut: give {length + excess}."
            )
        begun = case.prompt + case.answer_prefix
        answer = case.expected if begun[-1:].isspace() else " " + case.expected
        return Sample(
            task=task,
            index=index,
            length=length,
            prompt_ids=tuple(ids),
            answers=case.answers,
            metrics=(case.metric,),
            max_new_tokens=case.max_new_tokens,
            answer_ids=tuple(self._tokens(answer)),
            classes=case.classes,
            stop_ids=tuple(self._tokens(case.stop)[-1:]),
        )

    def check(self) -> None:
        """Makes the longest sample of every task and length."""
        for (task, length), cases in self.cases.items():
            self.sample(task, length, max(range(len(cases)), key=lambda index: len(cases[index].prompt)))

    def _prompt(self, case: Case, place: str) -> list[int]:
        encoder = self.encoders[case.in_turn]
        special = encoder.special.first(case.prompt[:64]) if encoder.use_template else None
        if special and special.start() == 0:
            raise LRSAError(
                f"{place}: its prompt begins with {special.group()}, so it stands in a chat template already: set "
                "data.chat_template=false."
            )
        return encoder.open_prompt(case.prompt, case.answer_prefix)

    def _cut_prompt(self, case: Case, task: str, length: int) -> list[int]:
        """The prompt without its middle: its first and last tokens, half each, as text, and that tokenized again.

        The template and the limit of the answer are what the rest of `length` is for.
        """
        encoder, tokens = self.encoders[case.in_turn], self.tokenizer(case.prompt).input_ids
        room = length - case.max_new_tokens
        left = room - len(encoder.open_prompt("", case.answer_prefix))
        while left >= MIN_LEFT:
            half = left // 2
            parts = [
                decoded(self.tokenizer, part, skip_special_tokens=True) for part in (tokens[:half], tokens[-half:])
            ]
            ids = encoder.open_prompt("".join(parts), case.answer_prefix)
            if len(ids) <= room:
                return ids
            left -= len(ids) - room
        raise LRSAError(
            f"lengths={length} is too short for {task}, whose answer may take {case.max_new_tokens} tokens: give at "
            f"least {length + MIN_LEFT - left}."
        )

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids
