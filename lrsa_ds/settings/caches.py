"""The caches under which a run is evaluated."""

from typing import NamedTuple

from lrsa_ds.layer_ranges import mappings
from lrsa_ds.layer_settings import Layers
from lrsa_ds.layers import AnyConfig, cache_names, in_model
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.run import EvalConfig

KEY = "eval.layers"


class NamedCache(NamedTuple):
    """A cache and its name in tables; `retention` is from `eval.retentions`, or the mean share kept."""

    name: str
    retention: float
    config: AnyConfig


def caches_of(attention: AttentionConfig, evaluation: EvalConfig, model: Layers) -> list[NamedCache]:
    """The caches of an evaluation of a model, each once.

    They are those of `eval.retentions`, then those of `eval.layers`; without these, what steps take whose layers
    differ.

    Raises:
        LRSAError: `eval.layers` or `attention.layers` is not for such a model.
    """
    attention = attention.resolved(model)
    found: dict[AnyConfig, float] = {}
    for retention in evaluation.retentions:
        found.setdefault(in_model(attention.with_retention(retention), model), retention)
    if evaluation.layers is not None:
        differing = [attention.with_layers(each, model, KEY) for each in mappings(KEY, evaluation.layers)]
    else:
        differing = [in_model(turn, model) for turn in attention.turns] if attention.layers else []
    for config in differing:
        found.setdefault(config, config.share_kept)
    return [
        NamedCache(name, found[config], config) for name, config in zip(cache_names(list(found)), found, strict=True)
    ]
