"""Telemetry of a model as it is: `launch/evaluate.py telemetry=true`, in place of answers."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from lrsa_ds.attention import AttentionFunction
from lrsa_ds.data.packing import IGNORE, Example, PackedSequence
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import require
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.evaluate.evaluator import LOGITS_AT_ONCE, Sample
from lrsa_ds.layer_settings import Layers
from lrsa_ds.layers import AnyConfig, OfLRSA
from lrsa_ds.logs.journal import Progress
from lrsa_ds.models.structure import layers_of
from lrsa_ds.objectives import TargetLoss
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.settings.attention import require_compression
from lrsa_ds.telemetry.measure import Measurement, Telemetry
from lrsa_ds.telemetry.settings import every_layer, require_dropping, require_greedy

WHEN = "evaluated"  # in the place of "before" or "after" training


def telemetry_cache(config: EvaluateConfig, trained: dict | None, model: Layers) -> OfLRSA:
    """The smallest of the caches, in every layer of the model that LRSA takes.

    Raises:
        LRSAError: it would drop nothing, or `telemetry_greedy` is more than the layers.
    """
    require(config.cache.retentions != [], "telemetry=true needs a number below 1 in cache.retentions.")
    cache = every_layer(config.cache.caches(trained), min(config.cache.retentions))
    require_dropping("telemetry", "cache.retentions", cache)
    require_greedy("telemetry_greedy", config.telemetry_greedy, model)
    for length in config.lengths:
        require_compression("lengths", length, cache, "cache", "telemetry=false")
    return cache


def to_example(sample: Sample) -> Example:
    """The prompt with its right answer, whose tokens are the targets."""
    labels = [IGNORE] * len(sample.prompt_ids) + list(sample.answer_ids)
    return Example([*sample.prompt_ids, *sample.answer_ids], labels, sample.task, sample.index)


def measure_samples(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    cache: OfLRSA,
    num_greedy: int,
    mesh: Mesh,
    shows_progress: bool,
) -> Telemetry:
    """What each layer of `model`, which is under `apply_lrsa`, loses under `cache`; the same on every rank."""
    objective = TargetLoss(model, LOGITS_AT_ONCE).eval()
    examples = [to_example(sample) for sample in samples if sample.answer_ids]

    def run_pass(row: PackedSequence, attention: AnyConfig, num_slots: int, attend: AttentionFunction) -> torch.Tensor:
        tokens = {name: getattr(row, name)[None].to(mesh.device) for name in ("input_ids", "position_ids", "labels")}
        lengths = row.document_lengths
        return objective(**tokens, document_lengths=lengths, lrsa_config=attention, num_slots=num_slots, attend=attend)

    progress: list[Progress] = []

    def on_pass(done: int, total: int) -> None:
        if mesh.is_main and shows_progress:
            progress[:] = progress or [Progress(total, unit="pass")]
            progress[0].show({"step": done})

    longest = max((len(example.input_ids) for example in examples), default=1)
    try:
        measurement = Measurement(run_pass, cache, layers_of(model.config), examples, longest, tokenizer, mesh, on_pass)
        return measurement.run(num_greedy)
    finally:  # an error is said below the bar
        for bar in progress:
            bar.close()
