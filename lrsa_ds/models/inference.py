"""Using a trained model: loading it with its settings, and prefilling a compressed cache."""

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
from lrsa_ds.models.compiled import check_compiled, compiled_logits
from lrsa_ds.models.last_token import last_token_alone
from lrsa_ds.models.liger import apply_liger, check_liger
from lrsa_ds.models.loading import load_model, model_config
from lrsa_ds.models.patch import apply_lrsa, new_cache, to_device
from lrsa_ds.settings.model import ModelConfig

# Tokens of a pass of `prefill`: the activations of an MLP with 9,000 channels then take less than 1 GB in 16 bits.
MAX_TOKENS_AT_ONCE = 16384


class Loaded(NamedTuple):
    """A model with LRSA attention, its tokenizer, and a function that makes an empty cache with its settings.

    `new_cache(layers, max_tokens)` makes other caches, as `lrsa_ds.new_cache(model, layers, max_tokens)` does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_cache: Callable[..., LagKVCache]


def load(
    path: str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    layers: Mapping[Any, Any] | None = None,
    liger_kernel: bool = False,
) -> Loaded:
    """Loads a model that was saved by `launch/train.py`, or by `save_pretrained` after `apply_lrsa`, for inference.

    Args:
        path: its directory, or its name on the hub.
        dtype: "auto" is the dtype in which it was saved.
        device: of the model; default: the GPU if there is one.
        layers: settings of layers that replace the saved ones, as for `lrsa_ds.apply_lrsa`. By default, a model trained
            with several settings in turn gets those of the smallest cache; `lrsa_ds.trained_caches` returns all.
        liger_kernel: whether Liger's fused kernels compute what lies between the matrix products (extra `liger`, on a
            GPU): prefilling and decoding are faster.

    Raises:
        LRSAError: the model does not exist, was saved without LRSA settings, `layers` does not fit it, or Liger is not
            installed or has no kernels for it.
    """
    source = ModelConfig(name=str(path), liger_kernel=liger_kernel)
    if liger_kernel:
        check_liger(source, model_config(source).model_type)
    model = load_model(source, dtype)
    settings = getattr(model.config, "lrsa", None)
    if settings is None:
        raise LRSAError(
            f"{path} was saved without LRSA settings: load it with transformers, and call "
            "lrsa_ds.apply_lrsa(model, lrsa_ds.LRSAConfig(...))."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if liger_kernel:
        apply_liger(model)
    model = apply_lrsa(model, from_saved(settings), layers) if layers else apply_lrsa(model, trained_turns(settings))
    model = to_device(model, device).eval()
    return Loaded(model, load_tokenizer(source), partial(new_cache, model))


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: LagKVCache,
    chunks_at_once: int | None = None,
    attention_mask: torch.Tensor | None = None,
    max_tokens_at_once: int = MAX_TOKENS_AT_ONCE,
    compile: bool | str = False,
) -> torch.Tensor:
    """Runs the tokens that `cache` has not seen through the model, many chunks in one pass, on the kernels of training.

    Beside the weights, the memory is bounded by the cache and the activations of one pass.

    Args:
        model: a causal language model under `apply_lrsa`.
        input_ids: [B, n], the next tokens of each row.
        cache: empty, or filled by an earlier `prefill` or `generate`.
        chunks_at_once: sets the tokens of a pass in chunks instead; with 1, S + 2L tokens first, then L at a time.
        attention_mask: [B, n], 1 for tokens and 0 for padding, which may be on either side; without it, rows that begin
            or end with the padding token are refused.
        max_tokens_at_once: tokens of each row in one pass, and the sink in the first: more are faster, take more
            memory, and give the same result. The passes have about the same size.
        compile: whether `torch.compile` fuses the small kernels between matrix products and attention. Passes are then
            faster, and the first call for a model and a number of rows takes longer; other lengths and caches need no
            compilation. Or the name of another backend than Inductor.

    Returns:
        The logits of the last token of each row, [B, vocabulary].

    Raises:
        LRSAError: a row has no tokens, padding is not marked, or the model cannot be compiled.
    """
    check_compiled(model, compile)
    if chunks_at_once is not None:
        require_whole("chunks_at_once", chunks_at_once, 1)
    require_whole("max_tokens_at_once", max_tokens_at_once, 1)
    require(input_ids.ndim == 2 and input_ids.numel() > 0, f"input_ids {list(input_ids.shape)} has no tokens.")
    mask = _token_mask(model, input_ids, attention_mask)
    if cache.row_lengths is not None or not bool(mask.all()):
        step = _even_step(input_ids.shape[1], max_tokens_at_once)
        step = step if chunks_at_once is None else chunks_at_once * cache.config.lag_size
        return _prefill_rows(model, input_ids, cache, step, mask, compile)
    logits, done = None, 0
    while done < input_ids.shape[1]:
        step = _step(cache, input_ids.shape[1] - done, chunks_at_once, max_tokens_at_once)
        part = input_ids[:, done : done + step]
        with last_token_alone(model, cache):
            logits = _pass(model, part, cache, None, 1, compile)
        done += part.shape[1]
    assert logits is not None  # there is a token
    return logits[:, -1]


def _step(cache: LagKVCache, num_left: int, chunks_at_once: int | None, max_tokens: int) -> int:
    """Tokens of the next pass, which ends with a chunk unless it were much shorter then.

    The sink comes on top, so that passes over a power of two of tokens do not leave a few tokens for one more pass.
    """
    seen, config = cache.get_seq_length(), cache.config
    room, lag = room_in_chunk(seen, config), config.lag_size
    if chunks_at_once is not None:
        return room + (chunks_at_once - 1) * lag
    sink = 0 if seen else config.sink_size
    most, even = sink + max_tokens, sink + _even_step(max(1, num_left - sink), max_tokens)
    if room > most:
        return even
    to_chunk_end = room + min(-(-max(0, even - room) // lag), (most - room) // lag) * lag
    return to_chunk_end if 2 * to_chunk_end >= even else even


def _even_step(num_left: int, max_tokens: int) -> int:
    """Tokens of a pass, if as few passes as possible have the same size: a short pass takes about as long as a long."""
    return -(-num_left // -(-num_left // max_tokens))


def _pass(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: LagKVCache,
    mask: torch.Tensor | None,
    keep: int | torch.Tensor,
    compile: bool | str,
) -> torch.Tensor:
    """Logits of the columns to keep, of a pass that fills the cache: [B, kept, vocabulary]."""
    if compile and tokens.shape[1] > 1:  # a single token would be compiled apart
        return compiled_logits(model, tokens, cache, mask, keep, compile)
    options = dict(past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return model(tokens, attention_mask=mask, **options).logits


def _prefill_rows(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: LagKVCache,
    step: int,
    mask: torch.Tensor,
    compile: bool | str,
) -> torch.Tensor:
    """`prefill` of rows with padding, `step` columns per pass: the logits of the last token of each row."""
    last = [row.nonzero()[-1, 0].item() for row in mask]
    found: dict[int, torch.Tensor] = {}
    # Where the padding was among the columns seen no longer matters: the cache knows the number of tokens of each row.
    lengths = torch.tensor(cache.row_lengths or [cache.get_seq_length()] * len(mask))
    mask = torch.cat([torch.arange(cache.get_seq_length()) < lengths[:, None], mask.cpu()], dim=1)
    for done in range(0, input_ids.shape[1], step):
        part = input_ids[:, done : done + step]
        ends = {row: place - done for row, place in enumerate(last) if done <= place < done + part.shape[1]}
        keep = torch.tensor([ends.get(row, 0) for row in range(len(last))], device=part.device)
        total = cache.get_seq_length() + part.shape[1]
        logits = _pass(model, part, cache, mask[:, :total], keep, compile)
        found |= {row: logits[row, row] for row in ends}
    return torch.stack([found[row] for row in range(len(mask))])


def _token_mask(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Which of `input_ids` are tokens, bool [B, n]."""
    if mask is not None:
        require(
            mask.shape == input_ids.shape,
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(input_ids.shape)}.",
        )
        require(bool((mask != 0).any(dim=1).all()), "a row of input_ids has no tokens: all of it is padding.")
        return mask != 0
    everything = torch.ones_like(input_ids, dtype=torch.bool)
    settings = model.generation_config
    pad, ends = settings.pad_token_id, settings.eos_token_id
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]) or pad == settings.bos_token_id:
        return everything
    require(
        not bool((input_ids[:, [0, -1]] == pad).any()),
        f"input_ids begin or end with the padding token {pad}: give the attention_mask of the tokenizer, or "
        "attention_mask=torch.ones_like(input_ids) where it is a token of the text.",
    )
    return everything
