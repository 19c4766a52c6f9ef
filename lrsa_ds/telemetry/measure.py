"""What each layer loses under a compressed cache, measured over examples.

Attention mass shows what a layer attends to, but not what the answers need. So each layer is also compressed alone,
with all others dense, and the loss of the answers is measured: the ablation.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from lrsa_ds.attention import AttentionFunction, layer_attention
from lrsa_ds.data.packing import Example, PackedSequence, pack, padding_sequence
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import require
from lrsa_ds.layer_settings import Layers, ModelLayers
from lrsa_ds.layers import AnyConfig, OfLRSA, uniform
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.telemetry.answers import find_answers
from lrsa_ds.telemetry.probe import RetentionProbe

# A pass over one row, with slots for its targets: [targets, 3], as `Objective.statistics`.
RunPass = Callable[[PackedSequence, AnyConfig, int, AttentionFunction], torch.Tensor]


@dataclass(frozen=True)
class LayerLoss:
    """What a layer loses; lists have an entry for each KV head.

    Args:
        nll_increase: per answer token, in nats, when only this layer is compressed.
        dropped_mass: share of the attention of answer tokens, in the dense pass, on tokens that the cache drops.
        answer_kept: kept share of the tokens that spell the answer and have left the window when it begins; None if no
            answer has such tokens.
    """

    layer: int
    nll_increase: float
    dropped_mass: list[float]
    answer_kept: list[float] | None


@dataclass(frozen=True)
class GreedyStep:
    """The layer that lowers the loss most when it becomes dense too, and the loss then, in nats per token."""

    layer: int
    nll: float


@dataclass(frozen=True)
class Telemetry:
    """The result of a `Measurement`.

    Args:
        retention: of the cache that is measured.
        num_answers_found: answers whose words occur before them in their document.
        nll_dense, nll_compressed: per answer token, in nats, with no layer and with every layer compressed.
        greedy: starting with every layer compressed, the layers that become dense, in order.
    """

    retention: float
    num_examples: int
    num_answers: int
    num_answers_found: int
    num_answer_tokens: int
    nll_dense: float
    nll_compressed: float
    layers: list[LayerLoss]
    greedy: list[GreedyStep]


def some_of_each_task(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples, or one of each task if that is more, distributed evenly over the tasks."""
    seen: Counter[str] = Counter()
    places = []
    for example in examples:
        places.append(seen[example.task])
        seen[example.task] += 1
    in_turn = sorted(range(len(examples)), key=places.__getitem__)
    return [examples[i] for i in in_turn[: max(count, len(seen))]]


def num_passes(num_layers: int, num_greedy: int) -> int:
    """Passes over all examples: the dense one, one for each layer alone, one for all layers, and the greedy choice."""
    return 2 + num_layers + sum(num_layers - step for step in range(num_greedy))


class Measurement:
    """Measures what each layer loses; every rank takes its share of the examples and runs the same passes.

    Args:
        run_pass: a pass of the model in evaluation mode; under ZeRO-3 a collective.
        compressed: the cache; none of its layers is dense.
        model: its layers; those that LRSA replaces are measured.
        examples: all of them on every rank, each of at most `seq_len` tokens.
        mesh: of ranks that do not share sequences.
        on_pass: called before each pass and at the end, with the numbers of passes done and of all passes of this rank.
    """

    def __init__(
        self,
        run_pass: RunPass,
        compressed: OfLRSA,
        model: Layers,
        examples: Sequence[Example],
        seq_len: int,
        tokenizer: Tokenizer,
        mesh: Mesh,
        on_pass: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.run_pass, self.tokenizer, self.mesh, self.on_pass = run_pass, tokenizer, mesh, on_pass
        self.compressed, self.model, self.num_examples = compressed, ModelLayers.of(model), len(examples)
        rows = list(pack(examples, seq_len, tokenizer.pad_token_id))
        rows += [padding_sequence(seq_len, tokenizer.pad_token_id)] * (-len(rows) % mesh.world_size)
        self.rows = rows[mesh.rank :: mesh.world_size]
        self.num_slots = max([1, *(row.num_target_tokens for row in rows)])
        self.num_targets = sum(row.num_target_tokens for row in rows)
        require(self.num_targets > 0, "there is no answer among the examples, so telemetry has nothing to measure.")

    @torch.no_grad()
    def run(self, num_greedy: int = 0) -> Telemetry:
        """Runs all passes; `num_greedy` is the number of layers that the greedy choice makes dense."""
        self.done, self.total = 0, len(self.rows) * num_passes(len(self.model.taken), num_greedy)
        dense, everything = self._look(), set(self.model.taken)
        increases = [self._nll({layer}) - dense.nll for layer in self.model.taken]
        found = Telemetry(
            retention=self.compressed.retention,
            num_examples=self.num_examples,
            num_answers=dense.num_answers,
            num_answers_found=dense.num_found,
            num_answer_tokens=self.num_targets,
            nll_dense=dense.nll,
            nll_compressed=self._nll(everything),
            layers=[
                LayerLoss(layer, increase, *_shares(sums.tolist(), self.num_targets))
                for layer, increase, sums in zip(self.model.taken, increases, dense.sums, strict=True)
            ],
            greedy=self._greedy(num_greedy),
        )
        self.on_pass(self.total, self.total)
        return found

    def _look(self) -> "_Dense":
        """The dense pass of every row, with its measurements."""
        probe, nll, num_answers, num_found = RetentionProbe(self.compressed), 0.0, 0, 0
        for row in self.rows:
            probe.answers = find_answers(row, self.tokenizer)
            num_answers += len(probe.answers)
            num_found += sum(answer.places != () for answer in probe.answers)
            nll += self._row_nll(row, self._attention(()), probe)
        sums = torch.stack([probe.sums[layer] for layer in self.model.taken])
        nll, num_answers, num_found, *flat = self.mesh.sum([nll, num_answers, num_found, *sums.flatten().tolist()])
        return _Dense(nll / self.num_targets, int(num_answers), int(num_found), torch.tensor(flat).view_as(sums))

    def _greedy(self, count: int) -> list[GreedyStep]:
        left, steps = set(self.model.taken), []
        for _ in range(count):
            tried = [GreedyStep(layer, self._nll(left - {layer})) for layer in sorted(left)]
            steps.append(min(tried, key=lambda step: step.nll))
            left.remove(steps[-1].layer)
        return steps

    def _nll(self, layers: Collection[int]) -> float:
        """Loss per answer token, in nats, with these layers compressed and all others dense."""
        attention = self._attention(layers)
        local = sum(self._row_nll(row, attention, layer_attention) for row in self.rows)
        return self.mesh.sum([local])[0] / self.num_targets

    def _attention(self, layers: Collection[int]) -> OfLRSA:
        """The attention of a pass in which these layers are compressed."""
        settings = [self.compressed.at_layer(layer) for layer in range(len(self.model))]
        return uniform([c if i in layers else c.at_retention(1.0) for i, c in enumerate(settings)])

    def _row_nll(self, row: PackedSequence, attention: AnyConfig, attend: AttentionFunction) -> float:
        self.on_pass(self.done, self.total)
        self.done += 1
        return self.run_pass(row, attention, self.num_slots, attend)[:, 0].double().sum().item()


@dataclass(frozen=True)
class _Dense:
    """The measurements of the dense pass, over all rows and ranks; `sums` has a row per layer, see `RetentionProbe`."""

    nll: float
    num_answers: int
    num_found: int
    sums: torch.Tensor


def _shares(sums: list[float], num_tokens: int) -> tuple[list[float], list[float] | None]:
    """`dropped_mass` and `answer_kept` of a layer from its sums."""
    num_heads, num_left = len(sums) // 2, sums[-1]
    kept = [share / num_left for share in sums[num_heads:-1]] if num_left else None
    return [mass / num_tokens for mass in sums[:num_heads]], kept
