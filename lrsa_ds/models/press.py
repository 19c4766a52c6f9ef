"""LRSA settings as a press of NVIDIA kvpress, whose pipelines and evaluations take one.

A press compresses a cache once, behind a prompt that was prefilled densely: the cache `after` of our evaluations. It
keeps what `LagKVCache` keeps, to the entry. Where layers keep different numbers of entries, the model has to run flash
attention, as for every press of kvpress that differs by layer.

kvpress needs an older transformers than training does; this module and `import lrsa_ds` work with both.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layers import AnyConfig, MixedConfig
from lrsa_ds.models.cache_layers import LagKVLayer
from lrsa_ds.models.patch import model_settings


def kvpress_press(settings: PreTrainedModel | AnyConfig, retention: float | None = None) -> Any:
    """A press with the sink, lag size, retention and selection rule of a model, layer by layer.

    `press.compression_ratio` is what kvpress reports: the share of each partition that is removed, the mean of layers.

    Args:
        settings: a model that LRSA has trained, loaded in any way, or settings.
        retention: another one than that of the settings; dense layers of settings that differ stay dense.

    Raises:
        LRSAError: kvpress is not installed, or the model has no LRSA settings, or layers of other kinds.
    """
    try:
        from kvpress import BasePress
    except ImportError as error:
        raise LRSAError(
            f"kvpress_press needs NVIDIA kvpress ({error}): pip install kvpress, in an environment of its own, since "
            "it needs an older transformers than training does."
        ) from error

    config = model_settings(settings) if isinstance(settings, PreTrainedModel) else settings
    require(
        not isinstance(config, MixedConfig),
        "kvpress_press compresses every layer, and some of this model's are of another kind: use lrsa_ds.LagKVCache.",
    )
    config = config if retention is None else config.at_retention(retention)

    class LRSAPress(BasePress):
        def __init__(self, config: AnyConfig):
            self.config = config
            self.compression_ratio = 1 - config.share_kept

        def compress(
            self,
            module: Any,
            hidden_states: Any,
            keys: torch.Tensor,
            values: torch.Tensor,
            attentions: Any,
            kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """What is kept of keys and values [B, G, N, D] of a layer, in position order."""
            layer = LagKVLayer(self.config.at_layer(module.layer_idx), module.layer_idx)
            layer.fill(keys, values, keys.shape[2])
            assert layer.keys is not None and layer.values is not None  # there were tokens
            return layer.keys, layer.values

    return LRSAPress(config)
