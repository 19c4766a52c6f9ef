"""Metrics of answers: one function each, with scores from 0 to 1, the best over all right answers.

Published benchmarks have their own metrics.
"""

import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from lrsa_ds.evaluate.evaluator import Sample
from recipes import benchmarks

Metric = Callable[[str, Sequence[str]], float]


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Whether the prediction is an answer, ignoring case, punctuation, articles and spaces (SQuAD's exact match)."""
    return float(any(_normal(prediction) == _normal(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words (SQuAD's F1)."""
    return max(_overlap(_normal(prediction).split(), _normal(answer).split()) for answer in answers)


def recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that the prediction contains, ignoring case (as RULER scores retrieval)."""
    found = prediction.lower()
    return sum(answer.lower() in found for answer in answers) / len(answers)


def partial(prediction: str, answers: Sequence[str]) -> float:
    """Length of the longest part of an answer in the prediction, relative to the length of the answer."""
    return max(_longest_common(prediction, answer) / len(answer) for answer in answers)


METRICS: dict[str, Metric] = {function.__name__: function for function in (exact, f1, recall, partial)}


def score(metric: str, prediction: str, sample: Sample) -> float:
    """The score of the output for a sample."""
    if metric in METRICS:
        return METRICS[metric](prediction, sample.answers)
    return benchmarks.METRICS[metric](prediction, sample.answers, sample.classes)


def _normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _overlap(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return float(prediction == answer)
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _longest_common(prediction: str, answer: str) -> int:
    match = SequenceMatcher(None, prediction, answer, autojunk=False).find_longest_match()
    return match.size
