"""The scores of all answers of an evaluation, so that runs can be compared question by question."""

import hashlib
from collections.abc import Sequence

import torch

from lrsa_ds.attention.partition import cache_factor
from lrsa_ds.data.packing import Example
from lrsa_ds.settings.caches import NamedCache


def answer_rows(
    examples: Sequence[Example], cache: NamedCache, totals_A3: torch.Tensor, num_answers: Sequence[int]
) -> list[dict]:
    """A row for each answer, in the order of the examples.

    Args:
        totals_A3: for each of A answers: its tokens, its correct tokens, and their negative log-likelihood in nats.
        num_answers: for each example, its number of answers.

    Returns:
        Rows with `task`, `context` (the same in all runs that have the same questions over the same tokens),
        `answer` (its number in the context), `cache`, `retention`, `cache_factor`, and its `num_tokens`, `num_correct`
        and `nll`.
    """
    rows, scores = [], iter(totals_A3.tolist())
    for example, count in zip(examples, num_answers, strict=True):
        common = {"task": example.task, "context": fingerprint(example), "cache": cache.name}
        common |= {"retention": cache.retention, "cache_factor": cache_factor([len(example.input_ids)], cache.config)}
        for answer in range(count):
            num_tokens, num_correct, nll = next(scores)
            score = {"num_tokens": int(num_tokens), "num_correct": int(num_correct), "nll": nll}
            rows.append(common | {"answer": answer} | score)
    return rows


def fingerprint(example: Example) -> str:
    """A hash of the tokens of an example, and of which of them are answers."""
    return hashlib.sha256(f"{list(example.input_ids)} {list(example.labels)}".encode()).hexdigest()[:16]
