"""Settings of the group `attention`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lrsa_ds.errors import require, require_one_of
from lrsa_ds.layers import AnyConfig, close_ranges, describe, read_ranges, uniform
from lrsa_ds.lrsa_config import LRSAConfig


@dataclass(kw_only=True)
class AttentionConfig:
    """LRSA or dense attention in training; `sink_size` and `lag_size` also serve the evaluation of a dense run.

    Args:
        retention: a number, or a list of which each step takes the next one.
        layers: from ranges of layers to a retention of their own, 1.0 for dense attention, or None for `retention`; see
            `lrsa_ds.layers`. `resolved` is needed before the settings reach a model.
    """

    kind: str = "lrsa"
    sink_size: int = 16
    lag_size: int = 1024
    retention: Any = 0.125
    selection: str = "lagkv"
    value_weight: float = 1.0
    layers: dict[Any, Any] = field(default_factory=dict)
    backend: str = "auto"

    def __post_init__(self):
        require_one_of("attention.kind", self.kind, ("lrsa", "dense"))
        require(
            self.kind == "lrsa" or not self.layers,
            "attention.layers has no effect under dense attention: use attention=lrsa.",
        )
        self._ranges = read_ranges(self.layers)
        require(self.retentions != [], "attention.retention=[] is not valid: give a number in (0, 1], or a list.")
        for step in range(len(self.retentions)):
            self.at_step(step)
        require(
            self.kind == "lrsa" or self.retentions == [1.0],
            f"attention.retention={self.retention!r} has no effect under dense attention: use attention=lrsa.",
        )

    @property
    def retentions(self) -> list:
        return list(self.retention) if isinstance(self.retention, (list, tuple)) else [self.retention]

    def resolved(self, num_layers: int) -> "AttentionConfig":
        """The same for a model of so many layers, each of which has an entry in `layers` if any has.

        Raises:
            LRSAError: `layers` leaves a layer out, or names one beyond the model.
        """
        if not self.layers:
            return self
        ranges = close_ranges(self._ranges, num_layers)
        return replace(self, layers={str(i): value for first, last, value in ranges for i in range(first, last + 1)})

    def at_step(self, step: int) -> AnyConfig:
        """The attention of optimizer step `step` (counted from 0): a list of retentions is taken in turn.

        A step at 1.0 is dense in every layer. Otherwise each layer has the retention that `layers` gives it, or that of
        the step.
        """
        retention = self.retentions[step % len(self.retentions)]
        return self._by_layer(retention, lambda own: retention if own is None else own)

    def with_retention(self, retention: float) -> AnyConfig:
        """The attention under another cache: layers that `layers` makes dense stay so, unless all are to be dense."""
        return self._by_layer(retention, lambda own: 1.0 if own == 1 else retention)

    def evaluated(self, retentions: list[float]) -> list[tuple[float, AnyConfig]]:
        """The caches of an evaluation with their names: these retentions, and what is trained where layers differ.

        The latter is named by the mean share that it keeps.
        """
        caches = [(retention, self.with_retention(retention)) for retention in retentions]
        trained = self.at_step(0)
        is_new = self.layers and trained not in [config for _, config in caches]
        return [*caches, (trained.share_kept, trained)] if is_new else caches

    def described(self) -> str:
        """Such as "retention 0.125"; with `layers` also what each layer keeps, step by step."""
        if not self.layers:
            return f"retention {self.retentions[0] if len(self.retentions) == 1 else self.retentions}"
        return ", then ".join(dict.fromkeys(describe(self.at_step(step)) for step in range(len(self.retentions))))

    def _by_layer(self, retention: float, choose: Callable[[float | None], float]) -> AnyConfig:
        values = [choose(own) for *_, own in self._ranges] if self._ranges and retention != 1 else [retention]
        return uniform([self._config(value) for value in values])

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
    """Raises LRSAError if no document of `length` tokens would be compressed; names `key` and what would help.

    Args:
        group: where sink_size and lag_size are set.
        instead: the setting that does the same and says so.
    """
    least = config.dense_prefix_size + 1
    most = (length - 1 - config.sink_size) // 2
    lag = f", {group}.lag_size of at most {most}" if most >= 2 else ""
    require(
        length >= least,
        f"{key}={length} is too short for anything to be compressed: the first sink_size + 2 * lag_size = {least - 1} "
        f"tokens of a document stay as they are; give at least {least}{lag}, or {instead}.",
    )
