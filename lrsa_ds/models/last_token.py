"""Passes that fill a cache and answer with the logits of their last token, as those of `prefill`.

The last layer has to compute keys and values of all tokens, which are cached, and its attention and MLP of one token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.keywords import attention_modules
from lrsa_ds.models.parts import decoder_of
from lrsa_ds.models.structure import layers_of

_FOUND = WeakIdKeyDictionary()


@contextmanager
def last_token_alone(model: PreTrainedModel, cache: LagKVCache) -> Iterator[None]:
    """Inside, the logits of the last token of a pass without padding are right, and those of other tokens are not.

    The MLP of the last layer gets the last token alone. What it returns is added to the hidden states of all tokens,
    and counts for that of the last. Layers of another form than Llama's compute all tokens, as always.
    """
    if model not in _FOUND:
        _FOUND[model] = _last_layer(model)
    if (found := _FOUND[model]) is None:
        yield
        return
    index, mlp = found
    hook = mlp.register_forward_pre_hook(_last_of)
    cache.answering_layer = index
    try:
        yield
    finally:
        hook.remove()
        cache.answering_layer = None


def _last_layer(model: PreTrainedModel) -> tuple[int, nn.Module] | None:
    """The number of the last layer and its MLP, if the layer has attention and is followed by a gated MLP."""
    last = len(layers_of(model.config)) - 1
    layers = [path[-1] for module, path in attention_modules(decoder_of(model)) if module.layer_idx == last and path]
    mlp = getattr(layers[0], "mlp", None) if len(layers) == 1 else None
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (last, mlp) if mlp is not None and all(isinstance(part, nn.Linear) for part in parts) else None


def _last_of(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Hook before the forward of an MLP: the last of the tokens [B, n, C]."""
    return (args[0][:, -1:], *args[1:])
