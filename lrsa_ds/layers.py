"""Settings layer by layer: the ranges in which they are written, and one `LRSAConfig` for each layer.

`attention.layers` maps ranges of layers ("0-1", "2-" up to the last one, "5" or 5) to a retention, 1.0 for dense
attention, or None for the retention of the run.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lrsa_ds.errors import require
from lrsa_ds.lrsa_config import LRSAConfig, require_retention

KEY = "attention.layers"


@dataclass(frozen=True)
class LayeredConfig:
    """One `LRSAConfig` for each layer of a model; it can stand where one for all layers can."""

    layers: tuple[LRSAConfig, ...]

    def at_layer(self, index: int) -> LRSAConfig:
        require(
            index < len(self.layers),
            f"the settings are for {len(self.layers)} layers, and the model has more: make them for this model, with "
            "lrsa_ds.apply_lrsa(model, config, layers).",
        )
        return self.layers[index]

    @property
    def share_kept(self) -> float:
        """Mean over the layers of the share of a partition that is kept."""
        return sum(config.share_kept for config in self.layers) / len(self.layers)

    @property
    def retention(self) -> float:
        return self.share_kept

    @property
    def is_dense(self) -> bool:
        return all(config.is_dense for config in self.layers)

    @property
    def _compressing(self) -> list[LRSAConfig]:
        return [config for config in self.layers if not config.is_dense] or list(self.layers)

    @property
    def dense_prefix_size(self) -> int:
        """The tokens of a document before any layer drops something."""
        return min(config.dense_prefix_size for config in self._compressing)

    @property
    def sink_size(self) -> int:
        """The largest of the layers that drop something."""
        return max(config.sink_size for config in self._compressing)

    @property
    def lag_size(self) -> int:
        """The smallest of the layers that drop something."""
        return min(config.lag_size for config in self._compressing)

    def at_retention(self, retention: float) -> "AnyConfig":
        """The same at another retention: dense layers stay dense, all others have it; 1.0 is dense attention.

        At its own mean share kept it is itself.
        """
        if retention == self.share_kept:
            return self
        return uniform([c if c.is_dense else c.at_retention(retention) for c in self.layers])

    def saved(self) -> dict[str, Any]:
        """The settings as a saved model remembers them; `from_saved` reads them."""
        return {"layers": [config.saved() for config in self.layers]}


AnyConfig = LRSAConfig | LayeredConfig


def uniform(configs: list[LRSAConfig]) -> AnyConfig:
    """One configuration for all layers where they are alike, or else each layer's own."""
    return configs[0] if len(set(configs)) == 1 else LayeredConfig(tuple(configs))


def from_saved(settings: Mapping[str, Any]) -> AnyConfig:
    """What `saved` of either kind has written; a model of the first release has one configuration for all layers."""
    if "layers" not in settings:
        return LRSAConfig(**settings)
    return uniform([LRSAConfig(**layer) for layer in settings["layers"]])


def resolve(config: AnyConfig, layers: Mapping[Any, Any] | None, num_layers: int) -> AnyConfig:
    """The settings of each of the model's layers.

    Args:
        config: where `layers` says nothing else.
        layers: from ranges of layers to a retention, None (that of `config`), or an `LRSAConfig`.

    Raises:
        LRSAError: a range is not one, two overlap, a layer is left out, or one is beyond the model.
    """
    if not layers:
        require(
            len(config.layers) in (1, num_layers),
            f"the settings are for {len(config.layers)} layers, and the model has {num_layers}.",
        )
        return config
    configs = []
    for first, last, value in close_ranges(read_ranges(layers), num_layers):
        here = [config.at_layer(layer) for layer in range(first, last + 1)]
        if isinstance(value, LRSAConfig):
            here = [value] * len(here)
        elif value is not None:
            here = [each.at_retention(value) for each in here]
        configs += here
    return uniform(configs)


def read_ranges(layers: Mapping[Any, Any]) -> list[tuple[int, int | None, Any]]:
    """First layer, last layer (None: the model's last one) and value of each range, in order.

    Raises:
        LRSAError: a key is no range, a value no retention, two ranges overlap, or a layer between them is left out.
    """
    ranges = sorted(((*_ends(key), value) for key, value in layers.items()), key=lambda entry: entry[0])
    for first, _, value in ranges:
        if value is not None and not isinstance(value, LRSAConfig):
            require_retention(f"{KEY} (from layer {first} on)", value)
    expected = 0
    for first, last, _ in ranges:
        require(expected is not None and first >= expected, f"{KEY} names layer {first} twice, in {_keys(layers)}.")
        assert expected is not None
        require(first == expected, f"{KEY} leaves out {_names(expected, first - 1)}, in {_keys(layers)}.")
        expected = None if last is None else last + 1
    return ranges


def close_ranges(ranges: list[tuple[int, int | None, Any]], num_layers: int) -> list[tuple[int, int, Any]]:
    """The same for a model of so many layers.

    Raises:
        LRSAError: a range is beyond the model, or the last layers are left out.
    """
    first, last, _ = ranges[-1]
    largest = first if last is None else last
    has = f"the model has {num_layers} layers, 0 to {num_layers - 1}"
    require(largest < num_layers, f"{KEY} names layer {largest}, and {has}.")
    require(
        last is None or last == num_layers - 1,
        f"{KEY} leaves out {_names(largest + 1, num_layers - 1)}: {has}; '{largest + 1}-' means all from there on.",
    )
    return [(first, num_layers - 1 if last is None else last, value) for first, last, value in ranges]


def _ends(key: Any) -> tuple[int, int | None]:
    """First and last layer of "3", 3, "0-1" or "2-"."""
    found = re.fullmatch(r"\s*(\d+)\s*(-?)\s*(\d*)\s*", str(key)) if isinstance(key, (str, int)) else None
    is_range = found is not None and not isinstance(key, bool) and bool(found[2] or not found[3])
    require(is_range, f"{KEY} has the key {key!r}: give a layer or a range of layers, such as 5, '0-1' or '2-'.")
    assert found is not None
    first = int(found[1])
    last = first if not found[2] else int(found[3]) if found[3] else None
    require(last is None or first <= last, f"{KEY} has the key {key!r}, which ends before it begins.")
    return first, last


def _keys(layers: Mapping[Any, Any]) -> str:
    return ", ".join(str(key) for key in layers)


def _names(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def describe(config: AnyConfig, one: Callable[[LRSAConfig], str] | None = None) -> str:
    """Such as "retention 0.125", or "layers 0-1 dense, 2-27 retention 0.1; mean share kept 0.164".

    Args:
        one: describes the settings of a layer.
    """
    one = one or _describe_one
    if isinstance(config, LRSAConfig):
        return one(config)
    parts, first = [], 0
    for said, group in groupby(map(one, config.layers)):
        last = first + len(list(group)) - 1
        parts.append(f"{first}-{last} {said}" if last > first else f"{first} {said}")
        first = last + 1
    return f"layers {', '.join(parts)}; mean share kept {config.share_kept:.3g}"


def _describe_one(config: LRSAConfig) -> str:
    return "dense" if config.is_dense else f"retention {config.retention:g}"
