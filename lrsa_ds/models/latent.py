"""Multi-head latent attention (DeepSeek) behind a LagKVCache: what is kept are the keys and values of the heads.

transformers caches one latent of each token, and makes the keys and values of all heads of it before each attention.
LRSA keeps single keys and values of each head. So the latents pass by the cache, and what they are expanded to goes
into it: `apply_lrsa` gives the cache to the attention function of such layers.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lrsa_ds.models.cache import LagKVCache


class PassBy:
    """In the place of a cache: hands on the new latents and holds none."""

    def update(self, first: torch.Tensor, second: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`."""
        return first, second


def cache_expanded(model: PreTrainedModel) -> None:
    """Layers of latent attention cache the keys and values of their heads from now on, under LRSA."""
    for module in model.modules():
        if hasattr(module, "expand_kv") and _defer not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_defer, with_kwargs=True)


def _defer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before the forward of a layer: its cache is for the attention function, as `expanded_cache`."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, LagKVCache) or not cache.is_open:  # a closed one refuses the tokens itself
        return args, kwargs
    return args, kwargs | {"past_key_values": PassBy(), "expanded_cache": cache}
