"""Answers with the caches of inference: real prefilling and greedy decoding, sample by sample.

Three ways to fill a cache are compared. "dense" keeps everything; "chunked" compresses during prefilling, chunk by
chunk, which is the function that LRSA trains; "after" prefills densely and compresses afterwards.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lrsa_ds.data.encoder import after_lead
from lrsa_ds.data.tokenizer import decoded
from lrsa_ds.layers import AnyConfig
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.decoder import CaptureError, can_capture
from lrsa_ds.models.decoding import generate as lrsa_generate
from lrsa_ds.models.generation import end_tokens, generate
from lrsa_ds.models.inference import prefill
from lrsa_ds.notices import say_once

# Parts of a text, by position, with separate perplexities.
NUM_POSITIONS = 16
# Tokens whose logits are in memory at once.
LOGITS_AT_ONCE = 1024


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Args:
        length: number of tokens that prompt and answer were generated for.
        answers: right answers; their meaning depends on the metric.
        metrics: names of metrics, the main one first; ("nll",) asks for the perplexity of the prompt itself.
        depth: place of the fact in the prompt, from 0 to 1, if there is one.
        lead_end: a word before the answer (`</think>`); the output up to it is not scored.
        answer_ids: the expected tokens after the prompt, including the end of the turn; none for "nll".
        classes: the labels of a classification, for metrics that need them.
        stop_ids: tokens that end this answer in addition to those of the model; then an answer has at least one token.
    """

    task: str
    index: int
    length: int
    prompt_ids: tuple[int, ...]
    answers: tuple[str, ...]
    metrics: tuple[str, ...]
    max_new_tokens: int
    depth: float | None = None
    lead_end: str = ""
    answer_ids: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


Score = Callable[[str, str, Sample], float]


@dataclass(frozen=True)
class Mode:
    """A way to fill the cache; `retention` is 1 for "dense".

    Args:
        layers: the name of a cache whose layers differ; `retention` is its mean share kept.
    """

    prefill: str
    retention: float
    layers: str = ""


DENSE = Mode("dense", 1.0)


@dataclass(frozen=True)
class Answer:
    """Generated tokens, the size of the cache before the first of them, and the time in seconds."""

    ids: list[int]
    size: dict[str, float]
    seconds: float


def modes(
    prefills: Sequence[str], retentions: Sequence[float], differing: Mapping[str, AnyConfig] | None = None
) -> list[Mode]:
    """All modes to compare, the dense one first; `differing` are caches whose layers differ, by name."""
    dense = [DENSE] if "dense" in prefills else []
    caches = [(config.share_kept, name) for name, config in (differing or {}).items()]
    caches += [(retention, "") for retention in retentions]
    return dense + [Mode(p, *cache) for p in prefills if p != "dense" for cache in caches]


class Evaluator:
    """Scores samples under every mode.

    Args:
        model: under `apply_lrsa`, on its device.
        attention: sink and lag size, and layers that differ; dense layers stay dense in every mode. Other retentions
            are not used.
        differing: the caches whose layers differ, by the names of the modes.
        score: from the name of a metric, a prediction and its sample to a number from 0 to 1.
        uses_storage: whether answers are decoded behind copies of the caches in fixed storage, by `lrsa_ds.generate`;
            by default, if the model is on one CUDA device, where a CUDA graph then replays the steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        attention: AnyConfig,
        score: Score,
        differing: Mapping[str, AnyConfig] | None = None,
        uses_storage: bool | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.attention = attention
        self.score = score
        self.differing = differing or {}
        self.ends = end_tokens(model, tokenizer)
        self._uses_storage = can_capture(model) if uses_storage is None else uses_storage
        self._storages: dict[AnyConfig, LagKVCache] = {}

    @torch.no_grad()
    def rows(self, sample: Sample, wanted: Sequence[Mode]) -> list[dict]:
        """A row for each mode: the sample, the mode, `scores` in percent (`nll` in nats), and the output.

        `num_tokens` and `num_held` are tokens seen and entries held by the cache when the answer begins (or at the end
        of a text), and `cache_bytes` its memory; generating `num_said` tokens took `seconds`. The score `first_token`
        tells whether the first generated token equals that of the dense mode, if that mode is wanted and the cache has
        dropped anything.
        """
        with warnings.catch_warnings():
            # Comparing caches that were not used in training is the purpose here.
            warnings.filterwarnings("ignore", message="the cache keeps")
            if sample.metrics == ("nll",):
                return [self._perplexity_row(sample, mode) for mode in wanted if mode.prefill != "after"]
            return self._answer_rows(sample, wanted)

    def _answer_rows(self, sample: Sample, wanted: Sequence[Mode]) -> list[dict]:
        prompt = torch.tensor([sample.prompt_ids], device=self.model.device)
        answers: dict[Mode, Answer] = {}
        for mode in wanted:
            if mode.prefill == "chunked":
                answers[mode] = self._answer(sample, prompt, self._filled(prompt, mode))
        others = [mode for mode in wanted if mode.prefill != "chunked"]
        if others:
            everything = self._filled(prompt, DENSE)
            # The dense mode is last: its answer is added to the cache from which the others are made.
            for mode in sorted(others, key=lambda mode: mode == DENSE):
                cache = everything if mode == DENSE else LagKVCache.from_dense(everything, self._config(mode))
                answers[mode] = self._answer(sample, prompt, cache)
        return [self._answer_row(sample, mode, answers[mode], answers.get(DENSE)) for mode in wanted]

    def _config(self, mode: Mode) -> AnyConfig:
        return self.differing[mode.layers] if mode.layers else self.attention.at_retention(mode.retention)

    def _filled(self, prompt: torch.Tensor, mode: Mode) -> LagKVCache:
        """A cache that has seen the prompt except its last token, which is the first step of decoding."""
        cache = LagKVCache(self._config(mode))
        ids = prompt[:, :-1]
        prefill(self.model, ids, cache, attention_mask=torch.ones_like(ids))
        return cache

    def _answer(self, sample: Sample, prompt: torch.Tensor, cache: LagKVCache) -> Answer:
        size = _size(cache)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=sample.max_new_tokens,
            min_new_tokens=1 if sample.stop_ids else None,
            eos_token_id=[*self.ends, *sample.stop_ids] or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        start = time.perf_counter()
        found = self._continued(prompt, cache, settings)
        ids = found[0, prompt.shape[1] :].tolist()  # waits for the device
        return Answer(ids, size, time.perf_counter() - start)

    def _continued(self, prompt: torch.Tensor, cache: LagKVCache, settings: GenerationConfig) -> torch.Tensor:
        """The prompt [1, N] and its answer, behind a cache that has seen all but its last token."""
        mask = torch.ones_like(prompt)  # otherwise the padding token would count as padding
        if self._uses_storage:
            fixed = self._storage(cache, prompt.shape[1] + settings.max_new_tokens)
            try:
                return lrsa_generate(self.model, prompt, fixed, attention_mask=mask, generation_config=settings)
            except CaptureError as error:
                say_once(f"answers are decoded without a CUDA graph: {error}")
                self._uses_storage = False
        return generate(self.model, prompt, attention_mask=mask, past_key_values=cache, generation_config=settings)

    def _storage(self, cache: LagKVCache, num_tokens: int) -> LagKVCache:
        """A copy of a cache in the storage for its settings, which serves answers to prompts of about one length."""
        step = max(256, 1 << (num_tokens.bit_length() - 4))
        size = -(-num_tokens // step) * step
        storage = self._storages.get(cache.config)
        if storage is None or storage.max_tokens != size:
            storage = self._storages[cache.config] = LagKVCache(cache.config, size)
        storage.take(cache)
        return storage

    def _answer_row(self, sample: Sample, mode: Mode, answer: Answer, dense: Answer | None) -> dict:
        text = decoded(self.tokenizer, answer.ids, skip_special_tokens=True)
        if sample.lead_end:
            text = after_lead(text, sample.lead_end)
        scores = {name: 100 * self.score(name, text, sample) for name in sample.metrics}
        if dense is not None and answer.size["num_held"] < dense.size["num_held"]:
            scores["first_token"] = 100.0 * (answer.ids[0] == dense.ids[0])
        said = {"scores": scores, "prediction": text, "answers": list(sample.answers)}
        said |= {"num_said": len(answer.ids), "seconds": answer.seconds}
        return _identity(sample, mode) | answer.size | said

    def _perplexity_row(self, sample: Sample, mode: Mode) -> dict:
        """Negative log-likelihood of every token of the prompt, given those before it, with the cache of the mode."""
        ids = torch.tensor([sample.prompt_ids], device=self.model.device)
        cache, losses = LagKVCache(self._config(mode)), []
        for part, targets in zip(ids.split(LOGITS_AT_ONCE, 1), ids[:, 1:].split(LOGITS_AT_ONCE, 1), strict=False):
            logits = self.model(part, past_key_values=cache, use_cache=True).logits[0, : targets.shape[1]]
            losses.append(cross_entropy(logits.float(), targets[0], reduction="none"))
        nll = torch.cat(losses)
        by_position = [part.mean().item() for part in nll.tensor_split(NUM_POSITIONS)]
        found = {"scores": {"nll": nll.mean().item()}, "nll_by_position": by_position}
        return _identity(sample, mode) | _size(cache) | found


def _size(cache: LagKVCache) -> dict[str, float]:
    """Tokens seen, entries held, and their size in bytes."""
    return {"num_tokens": cache.get_seq_length(), "num_held": cache.num_held, "cache_bytes": cache.num_bytes}


def _identity(sample: Sample, mode: Mode) -> dict:
    """The columns that identify a row, and the depth, if any."""
    row = {"task": sample.task, "length": sample.length, "index": sample.index}
    row |= {"prefill": mode.prefill, "retention": mode.retention, "layers": mode.layers}
    return row if sample.depth is None else row | {"depth": sample.depth}
