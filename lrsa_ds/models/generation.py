"""`model.generate` with the cache that LRSA needs: created if none is given, repeated for beams and samples.

In transformers a method of the model creates the cache of a generation; `use_lrsa_cache` overrides this method on the
instance, not on its class.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin, GenerationMode

from lrsa_ds.errors import require
from lrsa_ds.models.cache import LagKVCache

STATIC = "static"  # transformers' name of a cache of fixed storage


def use_lrsa_cache(model: PreTrainedModel, name: str, new_cache: Callable[..., LagKVCache]) -> None:
    """Lets `generate` use the cache of `new_cache(model, max_tokens=...)` while `name` is the attention of the model.

    So `pipeline("text-generation")` and other callers that pass no cache work. The model may be wrapped, as by PEFT.
    """

    # It has the name of the method that it overrides, so that a pickled model can be loaded.
    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if self.config._attn_implementation == name:
            most = max_cache_length if generation_config.cache_implementation == STATIC else None
            make = partial(new_cache, self, max_tokens=most)
            _prepare_cache(generation_config, model_kwargs, generation_mode, batch_size, make)
        original = type(self)._prepare_cache_for_generation
        return original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    for module in model.modules():
        if isinstance(module, GenerationMixin):
            module._prepare_cache_for_generation = MethodType(_prepare_cache_for_generation, module)


def _prepare_cache(
    settings: GenerationConfig,
    inputs: dict,
    mode: GenerationMode,
    batch_size: int,
    new_cache: Callable[[], LagKVCache],
) -> None:
    """Adds the cache of a generation to `inputs`, the keyword arguments of its passes.

    Raises:
        LRSAError: a row ends with padding, another kind of cache is given, or decoding is assisted.
    """
    require(
        mode != GenerationMode.ASSISTED_GENERATION and not settings.is_assistant,
        "assisted decoding takes tokens back, and a LagKVCache cannot give any: leave out assistant_model and "
        "prompt_lookup_num_tokens.",
    )
    mask = inputs.get("attention_mask")
    require(
        mask is None or mask.numel() == 0 or bool((mask[:, -1] != 0).all()),
        "a prompt ends with padding, and `generate` would continue after it: pad on the left "
        "(tokenizer.padding_side='left'), and give each prompt at least one token.",
    )
    cache = inputs.get("past_key_values")
    if cache is None and settings.use_cache:
        require(
            settings.cache_implementation in (None, "dynamic", STATIC),
            f"cache_implementation={settings.cache_implementation!r} is not a cache that keeps what LRSA attention "
            "keeps: leave it out, use 'static', or give past_key_values=lrsa_ds.LagKVCache(config).",
        )
        settings.cache_implementation = None
        inputs["past_key_values"] = new_cache()
    elif isinstance(cache, LagKVCache) and cache.batch_size == batch_size:
        cache.batch_repeat_interleave(max(settings.num_beams, settings.num_return_sequences))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that stop generation: those of the model's generation settings, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """`model.generate`, which the type of a model does not declare: the prompts [B, N] and their continuations."""
    return cast(Any, model).generate(ids, **options)
