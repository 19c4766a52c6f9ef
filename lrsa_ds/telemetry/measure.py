"""What each layer loses under a compressed cache, measured over examples.

Attention mass shows what a layer attends to, but not what the answers need. So each layer is also compressed alone,
with all others dense, and the loss of the answers is measured: the ablation. E is the number of examples.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from lrsa_ds.attention import AttentionFunction, layer_attention
from lrsa_ds.data.packing import IGNORE, Example, PackedSequence, pack, padding_sequence
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import require
from lrsa_ds.intervals import ratio_interval
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
        nll_increase_low, nll_increase_high: its 95 % interval over the examples; NaN for a single example.
        dropped_mass: share of the attention of answer tokens, in the dense pass, on tokens that the cache drops.
        answer_kept: kept share of the tokens that spell the answer and have left the window when it begins; None if no
            answer has such tokens.
    """

    layer: int
    nll_increase: float
    nll_increase_low: float
    nll_increase_high: float
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
        numbered = (replace(example, index=number) for number, example in enumerate(examples))
        rows = list(pack(numbered, seq_len, tokenizer.pad_token_id))
        rows += [padding_sequence(seq_len, tokenizer.pad_token_id)] * (-len(rows) % mesh.world_size)
        self.rows = rows[mesh.rank :: mesh.world_size]
        self.num_slots = max([1, *(row.num_target_tokens for row in rows)])
        self.num_targets_E = [sum(label != IGNORE for label in example.labels) for example in examples]
        self.num_targets = sum(self.num_targets_E)
        require(self.num_targets > 0, "there is no answer among the examples, so telemetry has nothing to measure.")

    @torch.no_grad()
    def run(self, num_greedy: int = 0) -> Telemetry:
        """Runs all passes; `num_greedy` is the number of layers that the greedy choice makes dense."""
        self.done, self.total = 0, len(self.rows) * num_passes(len(self.model.taken), num_greedy)
        dense, everything = self._look(), set(self.model.taken)
        increases = [self._increase(self._nll_E({layer}) - dense.nll_E) for layer in self.model.taken]
        found = Telemetry(
            retention=self.compressed.retention,
            num_examples=self.num_examples,
            num_answers=dense.num_answers,
            num_answers_found=dense.num_found,
            num_answer_tokens=self.num_targets,
            nll_dense=float(dense.nll_E.sum()) / self.num_targets,
            nll_compressed=self._nll(everything),
            layers=[
                LayerLoss(layer, *increase, *_shares(sums.tolist(), self.num_targets))
                for layer, increase, sums in zip(self.model.taken, increases, dense.sums, strict=True)
            ],
            greedy=self._greedy(num_greedy),
        )
        self.on_pass(self.total, self.total)
        return found

    def _look(self) -> "_Dense":
        """The dense pass of every row, with its measurements."""
        probe, nll_E, num_answers, num_found = RetentionProbe(self.compressed), self._zeros(), 0, 0
        for row in self.rows:
            probe.answers = find_answers(row, self.tokenizer)
            num_answers += len(probe.answers)
            num_found += sum(answer.places != () for answer in probe.answers)
            self._add_nll(nll_E, row, self._attention(()), probe)
        # A layer whose keys others share was observed with the queries of each of them.
        sums = torch.stack([probe.sums[layer] / self.model.num_readers(layer) for layer in self.model.taken])
        num_answers, num_found, *flat = self.mesh.sum([num_answers, num_found, *sums.flatten().tolist()])
        sums = torch.tensor(flat).view_as(sums)
        return _Dense(self._over_ranks(nll_E), int(num_answers), int(num_found), sums)

    def _greedy(self, count: int) -> list[GreedyStep]:
        left, steps = set(self.model.taken), []
        for _ in range(count):
            tried = [GreedyStep(layer, self._nll(left - {layer})) for layer in sorted(left)]
            steps.append(min(tried, key=lambda step: step.nll))
            left.remove(steps[-1].layer)
        return steps

    def _nll(self, layers: Collection[int]) -> float:
        """Loss per answer token, in nats, with these layers compressed and all others dense."""
        return float(self._nll_E(layers).sum()) / self.num_targets

    def _nll_E(self, layers: Collection[int]) -> torch.Tensor:
        """The same for each example, summed over its answer tokens."""
        attention, nll_E = self._attention(layers), self._zeros()
        for row in self.rows:
            self._add_nll(nll_E, row, attention, layer_attention)
        return self._over_ranks(nll_E)

    def _increase(self, difference_E: torch.Tensor) -> tuple[float, float, float]:
        """Per answer token, with its interval: the answers of an example are not independent, and count together."""
        pairs = zip(difference_E.tolist(), self.num_targets_E, strict=True)
        return ratio_interval(*zip(*((nll, count) for nll, count in pairs if count), strict=True))

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self.num_examples, dtype=torch.float64)

    def _over_ranks(self, sums_E: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.mesh.sum(sums_E.tolist()), dtype=torch.float64)

    def _attention(self, layers: Collection[int]) -> OfLRSA:
        """The attention of a pass in which these layers are compressed."""
        settings = [self.compressed.at_layer(layer) for layer in range(len(self.model))]
        return uniform([c if i in layers else c.at_retention(1.0) for i, c in enumerate(settings)])

    def _add_nll(
        self, nll_E: torch.Tensor, row: PackedSequence, attention: AnyConfig, attend: AttentionFunction
    ) -> None:
        """Runs a pass over a row, and adds the loss of its targets to those of their examples."""
        self.on_pass(self.done, self.total)
        self.done += 1
        nll = self.run_pass(row, attention, self.num_slots, attend)[:, 0].double().cpu()
        document = torch.tensor(row.example_indices).repeat_interleave(torch.tensor(row.document_lengths))
        targets = document[row.labels != IGNORE]
        nll_E.index_add_(0, targets, nll[: len(targets)])


@dataclass(frozen=True)
class _Dense:
    """The measurements of the dense pass, over all rows and ranks.

    `nll_E` has an entry per example, summed over its answer tokens; `sums` a row per layer, see `RetentionProbe`.
    """

    nll_E: torch.Tensor
    num_answers: int
    num_found: int
    sums: torch.Tensor


def _shares(sums: list[float], num_tokens: int) -> tuple[list[float], list[float] | None]:
    """`dropped_mass` and `answer_kept` of a layer from its sums."""
    num_heads, num_left = len(sums) // 2, sums[-1]
    kept = [share / num_left for share in sums[num_heads:-1]] if num_left else None
    return [mass / num_tokens for mass in sums[:num_heads]], kept
