"""Scores of answers under the caches of inference.

With teacher forcing, one pass with LRSA attention tells whether greedy decoding with the compressed cache produces the
answer: it does if and only if every answer token is the most likely one, given the true tokens before it. Up to the
first token that is not, decoding has seen exactly these tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lrsa_ds.attention import AttentionFunction
from lrsa_ds.attention.partition import cache_factor
from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE, Example, PackedSequence, collate, pack, padding_sequence
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.intervals import share_of_contexts
from lrsa_ds.layers import AnyConfig
from lrsa_ds.models.structure import layers_of
from lrsa_ds.objectives import objective_of
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.settings.caches import NamedCache, caches_of
from lrsa_ds.telemetry.measure import Measurement, Telemetry, some_of_each_task
from lrsa_ds.telemetry.settings import smallest_cache
from lrsa_ds.train.answers import answer_rows
from lrsa_ds.train.predictions import ShownAnswers, prediction_row
from lrsa_ds.train.trainer import Engine, forward, held_of


@dataclass(frozen=True)
class Moment:
    """The time of an evaluation: `when` is "before" or "after" training, or "step N"; `step` counts from 0."""

    when: str
    step: int


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Args:
        scores: a row for each task and cache, with `when`, `step`, `task`, `cache` (its name), `retention` (or the mean
            share kept), `cache_factor` (tokens seen / entries held, at the end of the examples), `exact_match` and
            `token_accuracy` in percent with the ends of their 95 % intervals, whose unit is the example
            (`exact_match_low`, `exact_match_high` and so on), `nll` per answer token in nats, `num_examples`, and
            `num_answers`, the basis of `exact_match`.
        predictions: a row for each of a few examples and each cache, with the same names and `exact`, `prompt`,
            `answer` and `prediction`; see `lrsa_ds.train.predictions`.
        answers: a row for each answer and cache, with `when`, `step` and the columns of `lrsa_ds.train.answers`.
    """

    scores: list[dict]
    predictions: list[dict]
    answers: list[dict]


@torch.no_grad()
def evaluate(
    engine: Engine,
    config: TrainConfig,
    mesh: Mesh,
    examples: list[Example],
    tokenizer: Tokenizer,
    moment: Moment,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Exact match and token accuracy of the answers, by task and cache, the same on every rank.

    Args:
        examples: all of them, on every rank; each rank processes its share.
        on_batch: called before each batch and at the end, with the number of answers done and of all, over all caches.
    """
    was_training = engine.training
    engine.eval()
    pad_id = tokenizer.pad_token_id
    batches = _batches(examples, config, pad_id, mesh.row_multiple)
    num_slots = max(1, *(batch.num_target_tokens for batch in batches))
    # Under ZeRO-3 every pass is a collective: a rank without a batch runs an empty one.
    idle = collate([padding_sequence(config.seq_len, pad_id)] * config.optim.micro_batch, mesh.row_multiple)
    batches += [idle] * (-len(batches) % mesh.dp_size)
    shown = ShownAnswers(examples)
    num_answers = torch.tensor([_num_answers(example) for example in examples])
    first_answer = num_answers.cumsum(0) - num_answers
    found = Evaluation([], [], [])
    caches = caches_of(config.attention, config.eval, layers_of(objective_of(engine).lm.config))
    total, done = len(examples) * len(caches), 0
    for cache in caches:
        totals = torch.zeros(int(num_answers.sum()), 3, dtype=torch.float64)
        shown.clear()
        for first in range(0, len(batches), mesh.dp_size):
            on_batch(done, total)
            batch = batches[first + mesh.dp_rank]
            targets = _targets(batch, mesh.local_tokens(len(batch.labels)))
            statistics = forward(engine, held_of(batch, mesh), cache.config, num_slots, mesh).double().cpu()
            answers = first_answer[targets[0]] + _answers(batch, mesh.local_tokens(len(batch.labels)))
            _add_scores(totals, answers, statistics)
            shown.add(*targets, statistics[:, 2])
            done += sum(_num_examples(other) for other in batches[first : first + mesh.dp_size])
        totals = torch.tensor(mesh.sum(totals.flatten().tolist())).view_as(totals)
        likeliest = shown.found(mesh.sum(shown.tokens_EM.flatten().tolist()))
        name = {"when": moment.when, "step": moment.step}
        found.answers.extend(name | row for row in answer_rows(examples, cache, totals, num_answers.tolist()))
        found.scores.extend(name | row for row in _score_rows(examples, cache, totals, num_answers))
        of_examples = torch.stack([answers.sum(dim=0) for answers in totals.split(num_answers.tolist())])
        rows = _prediction_rows(examples, cache, of_examples, likeliest, tokenizer)
        found.predictions.extend(name | row for row in rows)
    on_batch(total, total)
    engine.train(was_training)
    return found


def look_inside(
    engine: Engine,
    config: TrainConfig,
    mesh: Mesh,
    examples: list[Example],
    tokenizer: Tokenizer,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> Telemetry:
    """What each layer loses under the smallest cache of the evaluation (`eval.telemetry`), the same on every rank."""

    def run_pass(row: PackedSequence, attention: AnyConfig, num_slots: int, attend: AttentionFunction) -> torch.Tensor:
        return forward(engine, row, attention, num_slots, mesh, attend)

    was_training = engine.training
    engine.eval()
    chosen = some_of_each_task(examples, config.eval.telemetry_examples)
    cache = smallest_cache(config.attention, config.eval.retentions)
    layers = layers_of(objective_of(engine).lm.config)
    found = Measurement(run_pass, cache, layers, chosen, config.seq_len, tokenizer, mesh, on_pass).run(
        config.eval.telemetry_greedy
    )
    engine.train(was_training)
    return found


def _batches(examples: list[Example], config: TrainConfig, pad_id: int, multiple_of: int) -> list[PackedSequence]:
    """All examples, numbered by their index in the list, in batches of `micro_batch` sequences."""
    numbered = (replace(example, index=i) for i, example in enumerate(examples))
    sequences = list(pack(numbered, config.seq_len, pad_id))
    size = config.optim.micro_batch
    sequences += [padding_sequence(config.seq_len, pad_id)] * (-len(sequences) % size)
    return [collate(sequences[i : i + size], multiple_of) for i in range(0, len(sequences), size)]


def _num_examples(row: PackedSequence) -> int:
    return sum(index >= 0 for index in row.example_indices)  # padding has none


def _targets(row: PackedSequence, parts: tuple[slice, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each target in these parts of a complete row: the number of its example, and its place among the targets."""
    lengths, is_target = torch.tensor(row.document_lengths), row.labels != IGNORE
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    counts = document[is_target].bincount(minlength=len(lengths))
    place = is_target.cumsum(0) - 1 - (counts.cumsum(0) - counts)[document]
    example = torch.tensor(row.example_indices)[document]
    examples, places = (torch.cat([x[part][is_target[part]] for part in parts]) for x in (example, place))
    return examples, places


def _num_answers(example: Example) -> int:
    """Number of runs of targets: the answers of a conversation."""
    is_target = [label != IGNORE for label in example.labels]
    return sum(is_target[i] and not is_target[i - 1] for i in range(1, len(is_target)))


def _answers(row: PackedSequence, parts: tuple[slice, ...]) -> torch.Tensor:
    """For each target in these parts of a complete row: the number of its answer within its document."""
    lengths, is_target = torch.tensor(row.document_lengths), row.labels != IGNORE
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    # The last label of a document is not a target, so no run of targets continues in the next document.
    begins = is_target & ~torch.cat([torch.zeros(1, dtype=torch.bool), is_target[:-1]])
    counts = document[begins].bincount(minlength=len(lengths))
    number = begins.cumsum(0) - 1 - (counts.cumsum(0) - counts)[document]
    return torch.cat([number[part][is_target[part]] for part in parts])


def _add_scores(totals_A3: torch.Tensor, answers_T: torch.Tensor, statistics_T3: torch.Tensor) -> None:
    """Adds each target to the totals of its answer: one token, whether it is correct, and its nll."""
    nll, correct, _ = statistics_T3.unbind(dim=1)
    totals_A3.index_add_(0, answers_T, torch.stack([torch.ones_like(nll), correct, nll], dim=1))


def _score_rows(
    examples: list[Example], cache: NamedCache, totals_A3: torch.Tensor, num_answers_E: torch.Tensor
) -> list[dict]:
    rows = []
    for task in sorted({example.task for example in examples}):
        is_mine = torch.tensor([example.task == task for example in examples])
        mine = totals_A3[is_mine.repeat_interleave(num_answers_E)]
        num_tokens, _, nll = mine.sum(dim=0).tolist()
        of_contexts = _sums_of_contexts(mine, num_answers_E[is_mine])
        rows.append(
            {
                "task": task,
                "cache": cache.name,
                "retention": cache.retention,
                "cache_factor": cache_factor((len(e.input_ids) for e in examples if e.task == task), cache.config),
                **_share("exact_match", of_contexts[:, 1], of_contexts[:, 0]),
                **_share("token_accuracy", of_contexts[:, 3], of_contexts[:, 2]),
                "nll": nll / num_tokens,
                "num_examples": int(is_mine.sum()),
                "num_answers": len(mine),
            }
        )
    return rows


def _sums_of_contexts(totals_A3: torch.Tensor, num_answers_E: torch.Tensor) -> torch.Tensor:
    """[E, 4] for the E examples of these answers: answers, exact answers, tokens, correct tokens."""
    num_tokens, num_correct, _ = totals_A3.unbind(dim=1)
    of_answers = torch.stack([torch.ones_like(num_tokens), num_tokens == num_correct, num_tokens, num_correct], dim=1)
    return torch.stack([answers.sum(dim=0) for answers in of_answers.split(num_answers_E.tolist())])


def _share(name: str, right_E: torch.Tensor, counts_E: torch.Tensor) -> dict[str, float]:
    share, low, high = share_of_contexts(right_E.tolist(), counts_E.tolist())
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def _prediction_rows(
    examples: list[Example],
    cache: NamedCache,
    totals_E3: torch.Tensor,
    likeliest: dict[int, list[int]],
    tokenizer: Tokenizer,
) -> list[dict]:
    rows = []
    for number, tokens in likeliest.items():
        example, (num_tokens, num_correct, _) = examples[number], totals_E3[number].tolist()
        row = {"task": example.task, "example": number, "cache": cache.name, "retention": cache.retention}
        row |= {
            "cache_factor": cache_factor([len(example.input_ids)], cache.config),
            "exact": num_tokens == num_correct,
        }
        rows.append(row | prediction_row(tokenizer, example, tokens))
    return rows
