"""Settings of the group `attention`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lrsa_ds.errors import require, require_one_of
from lrsa_ds.layer_ranges import KEY, mappings, read_layers
from lrsa_ds.layer_settings import Layers
from lrsa_ds.layers import AnyConfig, OfLRSA, describe, in_model, settings_of, uniform
from lrsa_ds.lrsa_config import LRSAConfig


@dataclass(kw_only=True)
class AttentionConfig:
    """LRSA or dense attention in training; sizes and selection also serve the evaluation of a dense run.

    Args:
        retention: a number, or a list that steps use in turn.
        layers: from layers to a retention of their own, 1.0 for dense attention, to several settings, or to None for
            `retention`, see `lrsa_ds.layer_ranges.read_layers`; or a list of such mappings, of which each step takes
            the next one. `resolved` is needed before the settings reach a model.
    """

    kind: str = "lrsa"
    sink_size: int = 16
    lag_size: int = 1024
    retention: Any = 0.125
    selection: str = "lagkv"
    value_weight: float = 1.0
    layers: Any = None
    backend: str = "auto"

    def __post_init__(self):
        require_one_of("attention.kind", self.kind, ("lrsa", "dense"))
        require(
            self.kind == "lrsa" or not self.layers,
            "attention.layers has no effect under dense attention: use attention=lrsa, or eval.layers for the caches "
            "of an evaluation.",
        )
        self._written = [read_layers(layers) for layers in mappings(KEY, self.layers)]
        require(self.retentions != [], "attention.retention=[] is not valid: give a number from 0 to 1, or a list.")
        require(bool(self.turns), "attention.layers has no settings.")
        require(
            self.kind == "lrsa" or self.retentions == [1.0],
            f"attention.retention={self.retention!r} has no effect under dense attention: use attention=lrsa.",
        )

    @property
    def retentions(self) -> list:
        return list(self.retention) if isinstance(self.retention, (list, tuple)) else [self.retention]

    @property
    def turns(self) -> list[OfLRSA]:
        """All settings that steps use, each once."""
        num_steps = math.lcm(len(self.retentions), len(self._written) or 1)
        return list(dict.fromkeys(self.at_step(step) for step in range(num_steps)))

    def resolved(self, model: Layers) -> "AttentionConfig":
        """The same for a model, each of whose layers has an entry in `layers` if any has.

        Raises:
            LRSAError: `layers` leaves a layer out, or names one beyond the model.
        """
        if not self._written:
            return self
        each = [written.of_each(model) for written in self._written]
        return replace(self, layers=[{str(i): value for i, value in enumerate(values)} for values in each])

    def at_step(self, step: int) -> OfLRSA:
        """The attention of optimizer step `step` (counted from 0): lists are used in turn.

        A step at retention 1.0 is dense in every layer. Otherwise each layer has what `layers` gives it, or the
        retention of the step.
        """
        retention = self.retentions[step % len(self.retentions)]
        base = self._config(retention)
        if not self._written or retention == 1:
            return base
        return uniform([settings_of(value, base) for value in self._written[step % len(self._written)].values])

    def with_retention(self, retention: float) -> OfLRSA:
        """The attention under another cache, alike in every layer.

        Layers that `layers` makes dense stay so, unless all are to be dense, or `layers` is a list that is taken in
        turn.
        """
        base = self._config(retention)
        if len(self._written) != 1 or retention == 1:
            return base
        own = [settings_of(value, base) for value in self._written[0].values]
        return uniform([config if config.is_dense else base for config in own])

    def with_layers(self, layers: Mapping[Any, Any], model: Layers, key: str) -> AnyConfig:
        """The attention under a cache whose layers differ, with these sizes and rule where `layers` says nothing else.

        Args:
            key: the setting that holds `layers`, for errors.
        """
        base = self._config(self.retentions[0])
        values = read_layers(layers, key).of_each(model)
        return in_model(uniform([settings_of(value, base) for value in values]), model)

    def described(self, model: Layers) -> str:
        """Such as "retention 0.125"; with `layers` also what each layer of the model keeps, step by step."""
        if not self._written:
            return f"retention {self.retentions[0] if len(self.retentions) == 1 else self.retentions}"
        return ", then ".join(describe(in_model(turn, model)) for turn in self.turns)

    def _config(self, retention: float) -> LRSAConfig:
        return LRSAConfig(
            sink_size=self.sink_size,
            lag_size=self.lag_size,
            retention=retention,
            selection=self.selection,
            value_weight=self.value_weight,
            backend=self.backend,
        )


def require_compression(key: str, length: int, config: AnyConfig, group: str, instead: str) -> None:
    """Raises LRSAError if no document of `length` tokens would be compressed; the message suggests valid settings.

    Args:
        group: the group of sink_size and lag_size.
        instead: the setting that explicitly asks for dense attention.
    """
    least = config.dense_prefix_size + 1
    most = (length - 1 - config.sink_size) // 2
    lag = f", {group}.lag_size of at most {most}" if most >= 2 else ""
    require(
        length >= least,
        f"{key}={length} is too short for anything to be compressed: the first sink_size + 2 * lag_size = {least - 1} "
        f"tokens of a document are not compressed; give at least {least}{lag}, or {instead}.",
    )
