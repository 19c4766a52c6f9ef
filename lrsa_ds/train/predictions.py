"""A few predictions of each task under each cache, beside the right answers, as text.

Evaluation runs under teacher forcing, so a prediction is the likeliest token at each place behind the *right* tokens
before it. Up to its first wrong token it is what greedy decoding with that cache would say.

Shapes: E shown examples, M tokens of an answer, T targets of a pass.
"""

from collections import Counter

import torch

from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.data.tokenizer import Tokenizer

SHOWN_PER_TASK = 3
ANSWER_TOKENS = 128  # of an answer, the first
PROMPT_TOKENS = 48  # before an answer, the last


class ShownAnswers:
    """Collects the likeliest tokens of the first `SHOWN_PER_TASK` examples of each task, on every rank its own part."""

    def __init__(self, examples: list[Example]):
        count: Counter[str] = Counter()
        self.examples = examples
        self.shown: list[int] = []  # numbers of the examples
        for number, example in enumerate(examples):
            count[example.task] += 1
            if count[example.task] <= SHOWN_PER_TASK:
                self.shown.append(number)
        self.row_of = torch.full((len(examples),), -1)
        self.row_of[self.shown] = torch.arange(len(self.shown))
        self.tokens_EM = torch.zeros(len(self.shown), ANSWER_TOKENS, dtype=torch.float64)

    def clear(self) -> None:
        self.tokens_EM.zero_()

    def add(self, examples_T: torch.Tensor, places_T: torch.Tensor, likeliest_T: torch.Tensor) -> None:
        """Takes the likeliest token at each target: the `places_T`-th target of example `examples_T`."""
        rows_T = self.row_of[examples_T]
        is_shown = (rows_T >= 0) & (places_T < ANSWER_TOKENS)
        self.tokens_EM[rows_T[is_shown], places_T[is_shown]] = likeliest_T[is_shown].double()

    def found(self, sums: list[float]) -> dict[int, list[int]]:
        """The likeliest tokens by number of the example; `sums` is `tokens_EM`, flat, summed over the ranks."""
        rows = torch.tensor(sums).view_as(self.tokens_EM).long().tolist()
        return {n: row[: _num_targets(self.examples[n])] for n, row in zip(self.shown, rows, strict=True)}


def prediction_row(tokenizer: Tokenizer, example: Example, likeliest: list[int]) -> dict:
    """The end of the `prompt`, the right `answer` and the `prediction`, decoded, of at most `ANSWER_TOKENS` tokens."""
    targets = [label for label in example.labels if label != IGNORE]
    start = next((i for i, label in enumerate(example.labels) if label != IGNORE), 0)
    prompt = list(example.input_ids[max(0, start - PROMPT_TOKENS) : start])
    return {
        "prompt": tokenizer.decode(prompt),
        "answer": tokenizer.decode(targets[:ANSWER_TOKENS]),
        "prediction": tokenizer.decode(likeliest),
    }


def _num_targets(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels)
