"""The ranges of layers in which settings are written, such as {"3 7 9-11": 1.0, "rest": 0.1}."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lrsa_ds.errors import require
from lrsa_ds.layer_settings import Layers, ModelLayers
from lrsa_ds.lrsa_config import LRSAConfig, require_retention

KEY = "attention.layers"
REST = "rest"  # the key for all layers that no other key names
SETTINGS = ("retention", "sink_size", "lag_size", "selection", "value_weight")  # settings that may differ by layer


@dataclass(frozen=True)
class WrittenLayers:
    """Settings of layers as they were written, by ranges.

    Args:
        ranges: first layer, last layer (None: the model's last one) and value of each range, in order.
        rest: the value of all layers that no range names; empty if every layer must be named.
    """

    ranges: list[tuple[int, int | None, Any]]
    rest: list[Any]
    key: str = KEY

    @property
    def values(self) -> list[Any]:
        """All values that were written."""
        return [value for *_, value in self.ranges] + self.rest

    def of_each(self, layers: Layers) -> list[Any]:
        """The value of each layer of a model; None for those of other kinds.

        Raises:
            LRSAError: a layer is left out, named and not there, or of another kind; or "rest" is none.
        """
        layers = ModelLayers.of(layers)
        num_layers, taken = len(layers), layers.taken
        has = f"the model has {num_layers} layers, 0 to {num_layers - 1}"
        if len(taken) < num_layers:
            has += f", of which LRSA takes {written_layers(taken)}"
        found: dict[int, Any] = {}
        for first, last, value in self.ranges:
            largest = first if last is None else last
            require(largest < num_layers, f"{self.key} names layer {largest}, and {has}.")
            named = range(first, num_layers if last is None else last + 1)
            require(
                value is None or not set(named).isdisjoint(taken),
                f"{self.key} names {ranges_of(list(named))}, of which LRSA takes none: {has}; "
                f"{said_of_others(layers)}.",
            )
            found |= dict.fromkeys(named, value)
        left = [layer for layer in taken if layer not in found]
        require(
            not left or bool(self.rest),
            f"{self.key} leaves out {ranges_of(left)}: {has}; 'rest' means all that are not named.",
        )
        require(bool(left) or not self.rest, f"{self.key} names every layer, so 'rest' has no layers: {has}.")
        values = {layer: found[layer] if layer in found else self.rest[0] for layer in taken}
        return [values.get(layer) for layer in range(num_layers)]


def read_layers(layers: Mapping[Any, Any], key: str = KEY) -> WrittenLayers:
    """Reads a mapping from layers to settings.

    Args:
        layers: its keys are a layer (5), a range ("0-1", "2-": up to the last one), several of these with spaces or
            commas between them ("3 7 9-11"), or "rest" for all others. Its values are a retention, a mapping of
            settings such as {"retention": 0.0, "lag_size": 128}, an `LRSAConfig`, or None for the settings of the run.
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
    """The mappings in a setting: one, a list of them, or none.

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
            require(setting in SETTINGS, f"{of} has {setting!r}, which is not a setting: choose {', '.join(SETTINGS)}.")
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
    """Layers in the form of a key, such as "3 7 9-11"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def ranges_of(layers: list[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {written_layers(layers)}"


def said_of_kinds(layers: ModelLayers) -> str:
    """Such as "LRSA takes layers 5 11; layers 0-4 6-10 keep a sliding window of 16 tokens"."""
    return f"LRSA takes {ranges_of(layers.taken)}; {said_of_others(layers)}"


def said_of_others(layers: ModelLayers) -> str:
    """Such as "layers 0-4 6-10 keep a sliding window of 16 tokens"."""
    said = [other.said() if other else None for other in layers.others]
    kinds = dict.fromkeys(filter(None, said))
    each = [(kind, [layer for layer, own in enumerate(said) if own == kind]) for kind in kinds]
    return ", and ".join(f"{ranges_of(own)} keep{'s' * (len(own) == 1)} {kind}" for kind, own in each)
