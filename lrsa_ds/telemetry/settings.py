"""The cache that telemetry measures, and the checks before a process group starts."""

from collections.abc import Sequence
from dataclasses import replace

from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import require
from lrsa_ds.layer_settings import Layers, ModelLayers
from lrsa_ds.layers import AnyConfig, OfLRSA, uniform
from lrsa_ds.settings.attention import AttentionConfig, require_compression


def smallest_cache(attention: AttentionConfig, retentions: Sequence[float]) -> OfLRSA:
    """The smallest of an evaluation's caches, in every layer: layers that are kept dense are measured too."""
    return replace(attention, layers=None).with_retention(min(retentions))


def every_layer(config: OfLRSA, retention: float) -> OfLRSA:
    """`config` with this retention in every layer, including those that it keeps dense."""
    return uniform([layer.at_retention(retention) for layer in config.layers])


def check_telemetry(config: TrainConfig, model: Layers) -> None:
    """Raises LRSAError if `eval.telemetry` is not possible with these settings."""
    if not config.eval.telemetry:
        return
    cache = smallest_cache(config.attention, config.eval.retentions)
    require_dropping("eval.telemetry", "eval.retentions", cache)
    require_greedy("eval.telemetry_greedy", config.eval.telemetry_greedy, model)
    key, length = "seq_len", config.seq_len
    if config.data.makes_contexts and config.data.context_length is not None:
        key, length = "data.context_length", config.data.context_length
    require_compression(key, length, cache, "attention", "eval.telemetry=false")


def require_dropping(key: str, retentions: str, cache: AnyConfig) -> None:
    require(
        not cache.is_dense, f"{key}=true needs a cache that drops something: give a number below 1 in {retentions}."
    )


def require_greedy(key: str, num_greedy: int, model: Layers) -> None:
    num_layers = len(ModelLayers.of(model).taken)
    require(
        num_greedy <= num_layers,
        f"{key}={num_greedy} is more than the layers that LRSA takes: give 0 to {num_layers}.",
    )
