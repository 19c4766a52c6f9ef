"""Passes of `prefill` that `torch.compile` fuses: everything between matrix products and attention becomes few kernels.

The attention, with the cache behind it, is one operator that the compiler does not look into (`attention/opaque.py`).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast
from weakref import ref

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.opaque import OpaquePass
from lrsa_ds.attention.ragged import Rows, attention_behind
from lrsa_ds.errors import require
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.keywords import unfit_for_steps
from lrsa_ds.models.parts import decoder_of
from lrsa_ds.models.passes import read_pass
from lrsa_ds.models.patch import check_applied, open_cache
from lrsa_ds.models.recurrent import recurrent_modules


def check_compiled(model: PreTrainedModel, backend: bool | str) -> None:
    """Raises LRSAError if passes of the model cannot be compiled."""
    require(
        not backend or not recurrent_modules(model),
        f"compile={backend!r} compiles no recurrent layers, and {type(model).__name__} has some: leave compile out.",
    )


def compiled_logits(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: LagKVCache,
    mask: torch.Tensor | None,
    keep: int | torch.Tensor,
    backend: bool | str,
) -> torch.Tensor:
    """Logits of a pass behind a cache, which it fills: [B, kept, vocabulary].

    Args:
        tokens: [B, n].
        mask: as `read_rows` takes it, of all columns seen and new.
        keep: the columns with logits: so many of the last ones, or int64 [kept].
        backend: True for Inductor, or the name of another one.

    Raises:
        LRSAError: the model cannot be compiled, or mask or cache do not fit.
    """
    check_applied(model)
    decoder = _decoder_of(model)
    # A part of the columns has the strides of all columns, for which it would be compiled again.
    tokens = tokens.clone(memory_format=torch.contiguous_format)
    given = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}
    inputs = read_pass(given, lambda: cache)
    rows, num_seen = inputs.get("rows"), cache.get_seq_length()
    open_cache(decoder, cache, rows)
    opaque = OpaquePass(inputs["position_ids"], partial(_attend, cache, num_seen, rows))
    for x in (tokens, opaque.positions):
        torch._dynamo.maybe_mark_dynamic(x, 1)
    try:
        with opaque.under_way():
            return _compiled(backend)(model, tokens, opaque, keep)
    finally:
        cache.end_pass()


_DECODERS = WeakIdKeyDictionary()  # of models that can be compiled, as weak references


def _decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder, found once for a model: that takes milliseconds, in which the device waits."""
    found = _DECODERS[model]() if model in _DECODERS else None
    if found is None:
        reason = unfit_for_steps(model)
        require(reason is None, f"{type(model).__name__} {reason}, so it cannot be compiled: leave compile out.")
        found = decoder_of(model)
        _DECODERS[model] = ref(found)
    return found


def _attend(
    cache: LagKVCache,
    num_seen: int,
    rows: Rows | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    extras: Extras,
) -> torch.Tensor:
    keys, values = cache.update(k, v, layer)
    config, held = cache.config.at_layer(layer), cache.held(keys)
    only_last = cache.answering_layer == layer
    return attention_behind(q, keys, values, num_seen, rows, config, extras, layer, held, only_last)


def _logits_of(
    model: PreTrainedModel, tokens: torch.Tensor, opaque: OpaquePass, keep: int | torch.Tensor
) -> torch.Tensor:
    return cast(Any, model)(tokens, use_cache=False, step=opaque, logits_to_keep=keep).logits


@lru_cache
def _compiled(backend: bool | str) -> Callable[..., torch.Tensor]:
    """`_logits_of`, compiled: once for a model and a number of rows, since the number of tokens is dynamic."""
    # Beyond its limit of compilations dynamo would run passes uncompiled, without a word.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(_logits_of, backend="inductor" if backend is True else cast(str, backend))
