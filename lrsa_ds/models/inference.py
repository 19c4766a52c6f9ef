"""Using a trained model: loading it with its settings, and prefilling a compressed cache chunk by chunk."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa_ds.attention.partition import room_in_chunk
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError, require, require_whole
from lrsa_ds.layers import from_saved, trained_turns
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.loading import load_model
from lrsa_ds.models.passes import check_unpadded
from lrsa_ds.models.patch import apply_lrsa, new_cache, to_device
from lrsa_ds.settings.model import ModelConfig


class Loaded(NamedTuple):
    """A model with LRSA attention, its tokenizer, and a function that makes an empty cache with its settings.

    `new_cache(layers)` makes one of which layers differ, as `lrsa_ds.new_cache(model, layers)` does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_cache: Callable[..., LagKVCache]


def load(
    path: str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    layers: Mapping[Any, Any] | None = None,
) -> Loaded:
    """A model that `launch/train.py` or `save_pretrained` after `apply_lrsa` has saved, ready to answer.

    Args:
        path: its directory, or its name on the hub.
        dtype: "auto" is the one that it was saved in.
        device: where to put it; default: the GPU if there is one.
        layers: what its layers keep instead of what it was saved with, as for `lrsa_ds.apply_lrsa`. Without it a model
            that was trained with several settings in turn has those of the smallest cache; `lrsa_ds.trained_caches`
            has all of them.

    Raises:
        LRSAError: nothing is there, `layers` is not for the model, or the model was saved without LRSA settings.
    """
    source = ModelConfig(name=str(path))
    model = load_model(source, dtype)
    settings = getattr(model.config, "lrsa", None)
    if settings is None:
        raise LRSAError(
            f"{path} was saved without LRSA settings: load it with transformers, and call "
            "lrsa_ds.apply_lrsa(model, lrsa_ds.LRSAConfig(...))."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = apply_lrsa(model, from_saved(settings), layers) if layers else apply_lrsa(model, trained_turns(settings))
    model = to_device(model, device).eval()
    return Loaded(model, load_tokenizer(source), partial(new_cache, model))


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: LagKVCache,
    chunks_at_once: int = 1,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the tokens that `cache` has not seen through the model: S + 2L first, then L at a time.

    The memory that it takes beside the weights is bounded by the cache and the activations of one chunk.

    Args:
        model: a causal language model under `apply_lrsa`.
        input_ids: [B, n], the next tokens of the sequence, without padding.
        cache: empty, or behind an earlier `prefill` or `generate`.
        chunks_at_once: chunks of one forward pass: more of them are faster and take more memory, with the same result.
        attention_mask: [B, n], all ones; without it rows that begin or end with the padding token are refused.

    Returns:
        The logits of the last token, [B, vocabulary].

    Raises:
        LRSAError: there is no token, or there is padding.
    """
    require_whole("chunks_at_once", chunks_at_once, 1)
    require(input_ids.ndim == 2 and input_ids.numel() > 0, f"input_ids {list(input_ids.shape)} has no tokens.")
    _check_unpadded(model, input_ids, attention_mask)
    logits, done = None, 0
    while done < input_ids.shape[1]:
        step = room_in_chunk(cache.get_seq_length(), cache.config) + (chunks_at_once - 1) * cache.config.lag_size
        part = input_ids[:, done : done + step]
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        done += part.shape[1]
    assert logits is not None  # there is a token
    return logits[:, -1]


def _check_unpadded(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    if mask is not None:
        require(
            mask.shape == input_ids.shape,
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(input_ids.shape)}.",
        )
        return check_unpadded(mask)
    settings = model.generation_config
    pad, ends = settings.pad_token_id, settings.eos_token_id
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]) or pad == settings.bos_token_id:
        return
    require(
        not bool((input_ids[:, [0, -1]] == pad).any()),
        f"input_ids begin or end with the padding token {pad}, which LRSA would select and keep: give prompts of equal "
        "length, or one at a time; where it is a token of the text, give attention_mask=torch.ones_like(input_ids).",
    )
