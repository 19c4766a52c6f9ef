"""`lrsa_ds.generate`: generation with a cache of fixed storage, through a CUDA graph on a GPU.

transformers prepares everything (limits, logits processors, stopping criteria) and calls the loop in this module, as
the option `custom_generate` of its `generate` allows. The prompt is prefilled as in `prefill`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.models import generation
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.compiled import check_compiled
from lrsa_ds.models.decoder import Decoder, HostCopy, can_capture
from lrsa_ds.models.inference import prefill
from lrsa_ds.models.patch import check_applied


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: LagKVCache | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    graph: bool | None = None,
    compile: bool | str = False,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: Sequence[StoppingCriteria] = (),
    **options: Any,
) -> torch.Tensor:
    """The prompts and their continuations, [B, N + new tokens]: the result of `model.generate`, with fewer host waits.

    Args:
        model: a causal language model under `apply_lrsa`.
        input_ids: [B, N], the complete text of each row; rows of different lengths are padded on the left.
        cache: with `max_tokens`, empty or filled with the first tokens of `input_ids`; by default a new one with room
            for the answer. A CUDA graph is captured once for each cache, and is used again after `reset`.
        attention_mask: [B, N], 1 for tokens and 0 for padding.
        graph: whether steps are replayed from a CUDA graph; by default, if the model is on one CUDA device.
        compile: whether `torch.compile` first fuses the small kernels of a step, and those of the passes over the
            prompt. Both are then faster, and the first call for a model and a number of rows takes longer. Or the name
            of another backend than Inductor.
        streamer: receives the tokens as they are generated, such as `transformers.TextStreamer(tokenizer)`.
        tokenizer: needed for `stop_strings`, which end a row.
        options: those of `model.generate` for greedy decoding and sampling, such as `max_new_tokens`, `do_sample`,
            `temperature`, `top_p` and `num_return_sequences`.

    Raises:
        LRSAError: there is no token, no LRSA attention, too little room in the cache, or an option that only
            `model.generate` has.
    """
    check_applied(model)
    check_compiled(model, compile)
    require(input_ids.ndim == 2 and input_ids.numel() > 0, f"input_ids {list(input_ids.shape)} has no tokens.")
    _check_cache(cache, input_ids)
    criteria = StoppingCriteriaList(stopping_criteria)
    if stop_strings is not None:
        if tokenizer is None:
            raise LRSAError("stop_strings are read by the tokenizer: give tokenizer=... too.")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    captures = can_capture(model) if graph is None else graph
    require(
        not captures or can_capture(model),
        "graph=True needs the complete model on one CUDA device, and it is elsewhere: leave graph out.",
    )

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        _check_settings(generation_config)
        loop = Loop(generation_config, logits_processor, stopping_criteria, streamer)
        cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
        _check_room(cache, input_ids, mask, generation_config.max_length)
        return loop.run(input_ids, mask, Decoder.behind(cache, model, captures, compile), cache)

    options |= {"attention_mask": attention_mask, "streamer": streamer, "custom_generate": decode}
    options |= {"cache_implementation": generation.STATIC} if cache is None else {"past_key_values": cache}
    return generation.generate(model, input_ids, stopping_criteria=criteria, **options)


def _check_cache(cache: LagKVCache | None, input_ids: torch.Tensor) -> None:
    if cache is None:
        return
    require(
        isinstance(cache, LagKVCache) and cache.max_tokens is not None,
        "lrsa_ds.generate decodes behind a cache of fixed storage: give lrsa_ds.LagKVCache(config, max_tokens=...), "
        "cache.fixed(max_tokens), or none; model.generate takes others.",
    )
    seen, given = cache.get_seq_length(), input_ids.shape[1]
    require(
        seen < given,
        f"the cache has seen {seen} tokens, and input_ids has {given}: give the complete text, and a cache that has "
        "not seen its last token, as after lrsa_ds.prefill(model, ids[:, :-1], cache).",
    )


def _check_settings(settings: GenerationConfig) -> None:
    """Raises LRSAError for options that the loop does not support."""
    mode = settings.get_generation_mode()
    require(
        mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        f"lrsa_ds.generate decodes greedily or samples, and the options ask for {mode.value.replace('_', ' ')}: leave "
        "them out, or call model.generate.",
    )
    require(
        settings.use_cache and not settings.return_dict_in_generate,
        "lrsa_ds.generate returns tokens from a cache, and takes neither use_cache=False nor "
        "return_dict_in_generate=True: call model.generate for them.",
    )


def _check_room(cache: LagKVCache, input_ids: torch.Tensor, mask: torch.Tensor | None, max_length: int) -> None:
    """Raises LRSAError unless the cache has room for each row and its longest answer without its last token."""
    assert cache.max_tokens is not None
    longest = input_ids.shape[1] if mask is None else int(mask.sum(dim=1).max())
    total = longest + max_length - input_ids.shape[1] - 1
    require(
        total <= cache.max_tokens,
        f"prompt and answer may take {total} tokens in the cache, and it has max_tokens={cache.max_tokens}: make it "
        f"larger, or give a smaller max_new_tokens.",
    )


class Loop:
    """Decoding of one batch until each row has ended.

    Args:
        settings: prepared by transformers, like `processors` and `criteria`.
        processors: applied to the scores before a token is chosen.
        criteria: end rows.
    """

    def __init__(
        self,
        settings: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ):
        self.settings, self.processors, self.streamer = settings, processors, streamer
        # The host knows the lengths, so that the device is not asked for them.
        limits = [cast(Any, criterion).max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.max_length = min([settings.max_length, *limits])
        self.criteria = StoppingCriteriaList(c for c in criteria if type(c) is not MaxLengthCriteria)
        # As in transformers, rows that end by another criterion continue until all rows have ended.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def run(self, ids: torch.Tensor, mask: torch.Tensor | None, decoder: Decoder, cache: LagKVCache) -> torch.Tensor:
        """The prompts [B, N] and their continuations.

        Args:
            mask: [B, N], or None without padding.
        """
        seen = cache.get_seq_length()
        new = torch.ones_like(ids[:, seen:]) if mask is None else mask[:, seen:]
        logits = prefill(decoder.model, ids[:, seen:], cache, attention_mask=new, compile=decoder.compiles)
        decoder.start(cache)
        try:
            return self._decode(ids, logits, decoder, cache)
        finally:
            decoder.finish(cache)

    def _decode(self, ids: torch.Tensor, logits: torch.Tensor, decoder: Decoder, cache: LagKVCache) -> torch.Tensor:
        """Step by step from the logits [B, vocabulary] of the last tokens of the prompts on."""
        unfinished = torch.ones(len(ids), dtype=torch.int64, device=ids.device)
        text, length = ids.new_empty(len(ids), max(self.settings.max_length, ids.shape[1] + 1)), ids.shape[1]
        text[:, :length] = ids
        while True:
            tokens = self._choose(text[:, :length], logits, unfinished)
            text[:, length] = tokens
            length += 1
            ids, has_room = text[:, :length], length < self.max_length
            if self.criteria:
                unfinished = unfinished & ~self.criteria(ids, None)
            said = HostCopy(torch.cat([tokens, unfinished.max()[None]]) if self.criteria else tokens)
            # A graph runs ahead of the host, which checks meanwhile whether this was the last token. Tokens that a step
            # has stored count only after `end_step`.
            ahead = decoder.captures and has_room
            if ahead:
                logits = decoder(cache, tokens)
            is_unfinished = self._told(said, len(tokens))
            if not (has_room and is_unfinished):
                break
            if not ahead:
                logits = decoder(cache, tokens)
            decoder.end_step(cache)
        if self.streamer is not None:
            self.streamer.end()
        return ids.contiguous()

    def _choose(self, ids: torch.Tensor, logits: torch.Tensor, unfinished: torch.Tensor) -> torch.Tensor:
        """The next token of each row, int64 [B]; padding for rows that have ended."""
        scores = logits.to(ids.device)
        if self.processors or self.settings.do_sample:
            scores = self.processors(cast(Any, ids), scores.to(torch.float32, copy=True))
        if self.settings.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        pad = self.settings._pad_token_tensor
        if self.pads and pad is not None:
            tokens = torch.where(unfinished == 1, tokens, pad.to(ids.device))
        return tokens

    def _told(self, said: HostCopy, num_rows: int) -> bool:
        """Gives the streamer the tokens of the rows. False if the copy says behind them that all rows have ended."""
        copy = said.wait()
        if self.streamer is not None:
            self.streamer.put(copy[:num_rows])
        return bool(copy[num_rows:].all())
