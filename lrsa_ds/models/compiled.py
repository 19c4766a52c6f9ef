"""Passes of `prefill` that `torch.compile` fuses: everything between matrix products and attention becomes few kernels.

The attention, with the cache behind it, is one operator that the compiler does not look into (`attention/opaque.py`).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast
from weakref import ref

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.opaque import OpaquePass, stored
from lrsa_ds.attention.ragged import Rows, attention_behind
from lrsa_ds.attention.recompiling import allow_recompiling
from lrsa_ds.errors import require
from lrsa_ds.layers import source_of
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
    decoder, rotary = _parts_of(model)
    # A part of the columns has the strides of all columns, for which it would be compiled again.
    tokens = tokens.clone(memory_format=torch.contiguous_format)
    given = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}
    inputs = read_pass(given, lambda: cache)
    rows, num_seen = inputs.get("rows"), cache.get_seq_length()
    open_cache(decoder, cache, rows)
    opaque = OpaquePass(inputs["position_ids"], partial(_attend, cache, num_seen, rows))
    for x in (tokens, opaque.positions):
        torch._dynamo.maybe_mark_dynamic(x, 1)
    # Sines and cosines of positions would be computed again for each head of each layer.
    hooks = [module.register_forward_hook(_stored) for module in rotary]
    try:
        # torch's check of what operators do with memory fails where FlexAttention makes its blocks with vmap.
        with opaque.under_way(), torch._functorch.config.patch(check_custom_op_aliasing=False):
            return _compiled(backend)(model, tokens, opaque, keep)
    finally:
        cache.end_pass()
        for hook in hooks:
            hook.remove()


_PARTS = WeakIdKeyDictionary()  # of models that can be compiled, as weak references: a decoder may be the model


def _parts_of(model: PreTrainedModel) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The decoder and its rotary embeddings, found once for a model: it takes milliseconds, and the device waits."""
    if model not in _PARTS:
        reason = unfit_for_steps(model)
        require(reason is None, f"{type(model).__name__} {reason}, so it cannot be compiled: leave compile out.")
        decoder = decoder_of(model)
        rotary = [module for module in decoder.modules() if "RotaryEmbedding" in type(module).__name__]
        _PARTS[model] = [ref(part) for part in (decoder, *rotary)]
    decoder, *rotary = (part() for part in _PARTS[model])
    return decoder, rotary


def _stored(module: nn.Module, args: tuple, output: Any) -> Any:
    """Hook after the forward of a rotary embedding, which returns cosines and sines [B or 1, n, D]."""
    return tuple(map(stored, output)) if isinstance(output, tuple) else output


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
    keys, values = cache.shared(layer) or cache.update(k, v, layer)
    config, held = cache.config.at_layer(layer), cache.held(keys)
    only_last, source = cache.answering_layer == layer, source_of(cache.config, layer)
    return attention_behind(q, keys, values, num_seen, rows, config, extras, source, held, only_last)


def _logits_of(
    model: PreTrainedModel, tokens: torch.Tensor, opaque: OpaquePass, keep: int | torch.Tensor
) -> torch.Tensor:
    return cast(Any, model)(tokens, use_cache=False, step=opaque, logits_to_keep=keep).logits


@lru_cache
def _compiled(backend: bool | str) -> Callable[..., torch.Tensor]:
    """`_logits_of`, compiled: once for a model and a number of rows, since the number of tokens is dynamic."""
    allow_recompiling()
    return torch.compile(_logits_of, backend="inductor" if backend is True else cast(str, backend))
