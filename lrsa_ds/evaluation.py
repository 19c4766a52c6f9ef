"""Answers under the caches that inference would keep.

Under teacher forcing one pass with LRSA attention tells whether greedy decoding with the compressed cache gives the
answer: it does if and only if every answer token is the likeliest one, given the true tokens before it. Until the first
token that is not, decoding has seen exactly those tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE, Example, PackedSequence, collate, pack, padding_sequence
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.trainer import Engine, forward, held_of


@torch.no_grad()
def evaluate(
    engine: Engine,
    config: TrainConfig,
    mesh: Mesh,
    examples: list[Example],
    pad_id: int,
    when: str,
    on_batch: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Exact match and token accuracy of the answers, by task and retention: one row each, the same on every rank.

    Args:
        examples: all of them on every rank; each rank takes its share.
        when: "before" or "after" training, or "step N", copied into the rows.
        on_batch: called before each batch.

    Returns:
        Rows with `when`, `task`, `retention`, `exact_match` and `token_accuracy` in percent, `nll` per answer token in
        nats, and `num_examples`.
    """
    was_training = engine.training
    engine.eval()
    batches = _batches(examples, config, pad_id, mesh.row_multiple)
    num_slots = max(1, *(batch.num_target_tokens for batch in batches))
    # Under ZeRO-3 every pass is a collective: a rank without a batch of its own runs an empty one along.
    idle = collate([padding_sequence(config.seq_len, pad_id)] * config.optim.micro_batch, mesh.row_multiple)
    batches += [idle] * (-len(batches) % mesh.dp_size)
    rows = []
    for retention in config.eval.retentions:
        attention = config.attention.with_retention(retention)
        totals = torch.zeros(len(examples), 3, dtype=torch.float64)
        for batch in batches[mesh.dp_rank :: mesh.dp_size]:
            on_batch()
            targets = _example_of_target(batch, mesh.held(len(batch.labels)))
            _add_scores(totals, targets, forward(engine, held_of(batch, mesh), attention, num_slots, mesh))
        totals = torch.tensor(mesh.sum(totals.flatten().tolist())).view_as(totals)
        rows += _rows(when, retention, [example.task for example in examples], totals)
    engine.train(was_training)
    return rows


def _batches(examples: list[Example], config: TrainConfig, pad_id: int, multiple_of: int) -> list[PackedSequence]:
    """All examples, each known by its place in the list, in batches of `micro_batch` sequences."""
    numbered = (replace(example, index=i) for i, example in enumerate(examples))
    sequences = list(pack(numbered, config.seq_len, pad_id))
    size = config.optim.micro_batch
    sequences += [padding_sequence(config.seq_len, pad_id)] * (-len(sequences) % size)
    return [collate(sequences[i : i + size], multiple_of) for i in range(0, len(sequences), size)]


def _example_of_target(row: PackedSequence, parts: tuple[slice, ...]) -> torch.Tensor:
    """The number of the example that each target in these parts of a whole row belongs to."""
    example_of_token = torch.tensor(row.example_indices).repeat_interleave(torch.tensor(row.document_lengths))
    return torch.cat([example_of_token[part][row.labels[part] != IGNORE] for part in parts])


def _add_scores(totals_E3: torch.Tensor, examples_T: torch.Tensor, statistics_T2: torch.Tensor) -> None:
    """Adds to each target's example an answer token, whether it is correct, and its negative log-likelihood."""
    nll, correct = statistics_T2.double().cpu().unbind(dim=1)
    totals_E3.index_add_(0, examples_T, torch.stack([torch.ones_like(nll), correct, nll], dim=1))


def _rows(when: str, retention: float, tasks: list[str], totals_E3: torch.Tensor) -> list[dict]:
    rows = []
    for task in sorted(set(tasks)):
        mine = totals_E3[[t == task for t in tasks]]
        num_tokens, num_correct, nll = mine.sum(dim=0).tolist()
        exact = (mine[:, 0] == mine[:, 1]).double().mean().item()
        rows.append(
            {
                "when": when,
                "task": task,
                "retention": retention,
                "exact_match": 100 * exact,
                "token_accuracy": 100 * num_correct / num_tokens,
                "nll": nll / num_tokens,
                "num_examples": len(mine),
            }
        )
    return rows
