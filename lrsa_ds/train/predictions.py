"""A few predictions for each task and cache, next to the right answers, as text.

Evaluation uses teacher forcing: a prediction is the most likely token at each position after the *right* tokens before
it. Up to its first wrong token it equals the output of greedy decoding with that cache.

Shapes: E shown examples, M tokens of an answer, T targets of a pass.
"""

from collections import Counter

import torch

from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.data.tokenizer import Tokenizer

SHOWN_PER_TASK = 3
ANSWER_TOKENS = 128  # shown at most, from the beginning of an answer
PROMPT_TOKENS = 48  # shown at most, from the end of a prompt


class ShownAnswers:
    """Collects the most likely tokens of the first `SHOWN_PER_TASK` examples of each task; each rank has a part."""

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
        """Adds the most likely token for each target: the `places_T`-th target of example `examples_T`."""
        rows_T = self.row_of[examples_T]
        is_shown = (rows_T >= 0) & (places_T < ANSWER_TOKENS)
        self.tokens_EM[rows_T[is_shown], places_T[is_shown]] = likeliest_T[is_shown].double()

    def found(self, sums: list[float]) -> dict[int, list[int]]:
        """The most likely tokens by number of the example; `sums` is `tokens_EM`, flat and summed over the ranks."""
        rows = torch.tensor(sums).view_as(self.tokens_EM).long().tolist()
        return {n: row[: _num_targets(self.examples[n])] for n, row in zip(self.shown, rows, strict=True)}


def prediction_row(tokenizer: Tokenizer, example: Example, likeliest: list[int]) -> dict:
    """The end of the `prompt`, the right `answer` and the `prediction`, decoded and cut to `ANSWER_TOKENS` tokens."""
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
