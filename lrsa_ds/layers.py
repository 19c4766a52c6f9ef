"""Settings layer by layer: the ranges in which they are written, and one `LRSAConfig` for each layer.

`attention.layers` maps layers ("3 7 9-11", "2-" up to the last one, "rest") to a retention, 1.0 for dense attention, to
several settings, or to None for those of the run; see `read_layers`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from lrsa_ds.errors import require
from lrsa_ds.labels import retention_name
from lrsa_ds.lrsa_config import LRSAConfig, require_retention

KEY = "attention.layers"
TURNS = "turns"  # in what a saved model remembers: all settings that it was trained with
REST = "rest"  # the key that stands for all layers that no other names
SETTINGS = ("retention", "sink_size", "lag_size", "selection", "value_weight")  # what a layer may have of its own


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
        return LRSAConfig(**{name: value for name, value in settings.items() if name != TURNS})
    return uniform([LRSAConfig(**layer) for layer in settings["layers"]])


def saved_turns(configs: Sequence[AnyConfig]) -> dict[str, Any]:
    """What a model remembers that was trained with these settings in turn: the smallest cache, and all of them."""
    turns = list(dict.fromkeys(configs))
    smallest = smallest_of(turns).saved()
    return smallest if len(turns) == 1 else smallest | {TURNS: [config.saved() for config in turns]}


def trained_turns(settings: Mapping[str, Any]) -> list[AnyConfig]:
    """All settings that a model was trained with, from what it remembers, in the order in which they were taken."""
    return [from_saved(turn) for turn in settings.get(TURNS, [settings])]


def largest_first(configs: Iterable[AnyConfig]) -> list[AnyConfig]:
    """In the order of what their caches hold of a long document."""
    return sorted(configs, key=lambda config: (-config.share_kept, -config.lag_size))


def smallest_of(configs: Iterable[AnyConfig]) -> AnyConfig:
    return largest_first(configs)[-1]


def resolve(config: AnyConfig, layers: Mapping[Any, Any] | None, num_layers: int) -> AnyConfig:
    """The settings of each of the model's layers.

    Args:
        config: where `layers` says nothing else.
        layers: from layers to what they have instead; see `read_layers`.

    Raises:
        LRSAError: `layers` is not valid, or not for a model of so many layers.
    """
    if not layers:
        require(
            len(config.layers) in (1, num_layers),
            f"the settings are for {len(config.layers)} layers, and the model has {num_layers}.",
        )
        return config
    values = read_layers(layers).of_each(num_layers)
    return uniform([settings_of(value, config.at_layer(layer)) for layer, value in enumerate(values)])


def settings_of(value: Any, base: LRSAConfig) -> LRSAConfig:
    """The settings of a layer for which `value` is written (see `read_layers`), where all others have `base`."""
    if isinstance(value, LRSAConfig):
        return value
    if isinstance(value, Mapping):
        return replace(base, **value)
    return base if value is None else base.at_retention(value)


@dataclass(frozen=True)
class WrittenLayers:
    """What is written about the layers of a model.

    Args:
        ranges: first layer, last layer (None: the model's last one) and value of each range, in order.
        rest: the value of all layers that no range names; empty where every layer has to be named.
    """

    ranges: list[tuple[int, int | None, Any]]
    rest: list[Any]
    key: str = KEY

    @property
    def values(self) -> list[Any]:
        """Each value that is written."""
        return [value for *_, value in self.ranges] + self.rest

    def of_each(self, num_layers: int) -> list[Any]:
        """The value of each of so many layers.

        Raises:
            LRSAError: a layer is left out, or named and not there, or "rest" is none.
        """
        has = f"the model has {num_layers} layers, 0 to {num_layers - 1}"
        found: dict[int, Any] = {}
        for first, last, value in self.ranges:
            largest = first if last is None else last
            require(largest < num_layers, f"{self.key} names layer {largest}, and {has}.")
            found |= dict.fromkeys(range(first, num_layers if last is None else last + 1), value)
        left = [layer for layer in range(num_layers) if layer not in found]
        require(
            not left or bool(self.rest),
            f"{self.key} leaves out {_ranges_of(left)}: {has}; 'rest' means all that are not named.",
        )
        require(bool(left) or not self.rest, f"{self.key} names every layer, so that 'rest' is none: {has}.")
        return [found[layer] if layer in found else self.rest[0] for layer in range(num_layers)]


def read_layers(layers: Mapping[Any, Any], key: str = KEY) -> WrittenLayers:
    """What a mapping says of the layers of a model.

    Args:
        layers: its keys are a layer (5), a range ("0-1", "2-": up to the last one), several of these with spaces or
            commas between them ("3 7 9-11"), or "rest" for all others. Its values are a retention, a mapping of
            settings such as {"retention": 0.0, "lag_size": 128}, an `LRSAConfig`, or None for what all others have.
        key: the setting, for errors.

    Raises:
        LRSAError: a key or a value is none of these, or a layer is named twice.
    """
    require(
        isinstance(layers, Mapping) and len(layers) > 0,
        f"{key} has {layers!r} where settings by layer belong: write {{3 7-9: 1.0, rest: 0.25}}.",
    )
    ranges, rest = [], []
    for name, value in layers.items():
        _check_value(key, name, value)
        if name == REST:
            rest.append(value)
        else:
            ranges += [(*_ends(part, key), value) for part in _parts(name)]
    ranges.sort(key=lambda entry: entry[0])
    expected: int | None = 0
    for first, last, _ in ranges:
        require(expected is not None and first >= expected, f"{key} names layer {first} twice, in {_keys(layers)}.")
        expected = None if last is None else last + 1
    return WrittenLayers(ranges, rest, key)


def mappings(key: str, layers: Any) -> list[Any]:
    """The mappings that a setting holds, which is one, a list of them, or nothing.

    Raises:
        LRSAError: it is something else.
    """
    if layers is None or layers == {}:
        return []
    require(
        isinstance(layers, (Mapping, list, tuple)),
        f"{key}={layers!r} is not valid: write '{key}={{3 7-9: 1.0, rest: 0.25}}', or a list of such mappings.",
    )
    return [layers] if isinstance(layers, Mapping) else list(layers)


def _check_value(key: str, name: Any, value: Any) -> None:
    of = f"{key} (of layer {name})"
    if isinstance(value, Mapping):
        for setting in value:
            require(setting in SETTINGS, f"{of} has {setting!r}, which is no setting: choose {', '.join(SETTINGS)}.")
        value = value.get("retention")
    if value is not None and not isinstance(value, LRSAConfig):
        require_retention(of, value)


def _parts(name: Any) -> list[Any]:
    """The layers and ranges of a key."""
    return re.sub(r"\s*-\s*", "-", name).replace(",", " ").split() or [name] if isinstance(name, str) else [name]


def _ends(part: Any, key: str) -> tuple[int, int | None]:
    """First and last layer of "3", 3, "0-1" or "2-"."""
    found = re.fullmatch(r"(\d+)(-?)(\d*)", str(part)) if isinstance(part, (str, int)) else None
    is_range = found is not None and not isinstance(part, bool) and bool(found[2] or not found[3])
    require(
        is_range, f"{key} has the key {part!r}: give layers or ranges of layers, such as 5, '0-1', '3 7 9-', or 'rest'."
    )
    assert found is not None
    first = int(found[1])
    last = first if not found[2] else int(found[3]) if found[3] else None
    require(last is None or first <= last, f"{key} has the key {part!r}, which ends before it begins.")
    return first, last


def _keys(layers: Mapping[Any, Any]) -> str:
    return ", ".join(str(key) for key in layers)


def written_layers(layers: Iterable[int]) -> str:
    """Layers as a key names them, such as "3 7 9-11"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _ranges_of(layers: list[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {written_layers(layers)}"


def describe(config: AnyConfig, one: Callable[[LRSAConfig], str] | None = None) -> str:
    """Such as "retention 0.125", or "layers 0-1 dense, 2-27 retention 0.1; mean share kept 0.164".

    Args:
        one: describes the settings of a layer.
    """
    one = one or _describe_one
    if isinstance(config, LRSAConfig):
        return one(config)
    each = list(map(one, config.layers))
    if len(set(each)) == 1:
        return each[0]
    parts, first = [], 0
    for said, group in groupby(each):
        last = first + len(list(group)) - 1
        parts.append(f"{first}-{last} {said}" if last > first else f"{first} {said}")
        first = last + 1
    return f"layers {', '.join(parts)}; mean share kept {config.share_kept:.3g}"


def _describe_one(config: LRSAConfig) -> str:
    return "dense" if config.is_dense else f"retention {config.retention:g}" if config.retention else "window"


def cache_names(configs: Sequence[AnyConfig]) -> list[str]:
    """Different names for tables, such as "1/8", or "6 dense + 24 window" by the numbers of layers."""
    names = [_cache_name(config) for config in configs]
    for more in (lambda place: f", L = {configs[place].lag_size}", lambda place: f" ({place + 1})"):
        count = Counter(names)
        names = [name + more(place) if count[name] > 1 else name for place, name in enumerate(names)]
    return names


def _cache_name(config: AnyConfig) -> str:
    if isinstance(config, LRSAConfig):
        return retention_name(config.retention)
    count = Counter(layer.share_kept for layer in config.layers)
    words = {1.0: "dense", 0.0: "window"}
    kinds = [
        f"{count[share]} {words.get(share, f'at {retention_name(share)}')}" for share in sorted(count, reverse=True)
    ]
    return " + ".join(kinds)
