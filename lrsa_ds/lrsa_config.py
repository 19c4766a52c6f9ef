"""`LRSAConfig`: all settings of LRSA attention."""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from lrsa_ds.errors import require, require_one_of, require_whole
from lrsa_ds.layer_settings import UNLIMITED, LayerSettings
from lrsa_ds.registry import KERNELS, SELECTION_RULES

AUTO = "auto"  # the fastest kernel that can run


def require_retention(key: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(
        number and 0 <= value <= 1,
        f"{key}={value!r} is not valid: give the share of each partition that is kept, from 0 (nothing but sink and "
        "window) to 1.",
    )


def require_weight(key: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(
        number and 0 <= value < 1e38,  # the score is in fp32
        f"{key}={value!r} is not valid: give a number of at least 0 and below 1e38.",
    )


@dataclass(frozen=True, kw_only=True)
class LRSAConfig(LayerSettings):
    """Settings of Lag-Relative Sparse Attention (LagKV, arXiv 2504.04704, section 3).

    Args:
        sink_size: tokens at the start of a document that stay visible to all of it (S).
        lag_size: tokens of a partition, and of the lag reference that scores it (L).
        retention: share of each partition that is kept; 1.0 is dense attention, 0.0 keeps only sink and window.
        selection: the rule that selects the kept KV (see `lrsa_ds.attention.selection`).
        value_weight: weight of the values' score beside that of the keys, at least 0 (`score_v_ratio` in the authors'
            code), for rules that score both.
        backend: "chunked" (readable, any device), "flex" (FlexAttention, CUDA), "fa4" (flash-attn-4, Hopper) or "auto",
            which is the fastest that the device, the dtype and the head dim allow.

    Raises:
        LRSAError: a value is out of range, or the retention is so small that no token of a partition is kept.
    """

    kind: ClassVar[str] = "lrsa"

    sink_size: int = 16
    lag_size: int = 1024
    retention: float = 0.125
    selection: str = "lagkv"
    value_weight: float = 1.0
    backend: str = "auto"

    def __post_init__(self):
        require_whole("attention.sink_size", self.sink_size, 0)
        require_whole("attention.lag_size", self.lag_size, 2)
        require_retention("attention.retention", self.retention)
        rule = SELECTION_RULES[self.selection]
        require_weight("attention.value_weight", self.value_weight)
        require(
            self.value_weight == 1 or "value_weight" in rule.reads,
            f"attention.value_weight={self.value_weight} has no effect with attention.selection={self.selection}: "
            "leave it at 1.0.",
        )
        require_one_of("attention.backend", self.backend, (AUTO, *KERNELS))
        require(
            self.num_kept >= 1 or self.retention == 0 or rule.keeps_nothing,
            f"attention.retention={self.retention} keeps nothing of a partition of attention.lag_size={self.lag_size} "
            f"tokens: give at least {1 / self.lag_size:.4g}, or 0 for sink and window alone.",
        )

    @property
    def num_kept(self) -> int:
        """K, the number of keys and values kept of each partition: int(r * L), as in LagKV; 0 under some rules."""
        if self.retention < 1 and SELECTION_RULES[self.selection].keeps_nothing:
            return 0
        return int(self.retention * self.lag_size)

    @property
    def dense_prefix_size(self) -> int:
        """S + 2L: the number of tokens at the start of a document for which attention is dense and the cache complete.

        Documents with at most this many tokens are trained on as with dense attention. The cache is first compressed
        after this many tokens.
        """
        return self.sink_size + 2 * self.lag_size

    @property
    def is_dense(self) -> bool:
        """Whether everything is kept, so that the attention is dense causal attention."""
        return self.num_kept == self.lag_size

    @property
    def share_kept(self) -> float:
        """Share of a partition that is kept, K / L."""
        return self.num_kept / self.lag_size

    def num_compressed(self, num_tokens: int) -> int:
        """Partitions that a cache has compressed to their kept KV after `num_tokens` tokens of a document.

        All complete partitions but the last, from S + 2L tokens on (LagKV, arXiv 2504.04704, equation 12).
        """
        return 0 if self.is_dense else max(0, (num_tokens - self.sink_size) // self.lag_size - 1)

    def num_held(self, num_tokens: int) -> int:
        """All n for n < S + 2L tokens, else S + K (floor((n - S) / L) - 1) + L + (n - S) mod L (LagKV, as above)."""
        return num_tokens - self.num_compressed(num_tokens) * (self.lag_size - self.num_kept)

    def most_held(self, max_tokens: int) -> int:
        seen = max_tokens - 1
        num_compressed = self.num_compressed(seen)
        # More than behind all tokens may be held before the last compression.
        before = self.sink_size + (num_compressed + 1) * self.lag_size - 1 if num_compressed else 0
        return 1 + max(self.num_held(seen), self.num_held(before))

    def room_in_chunk(self, num_tokens: int) -> int:
        if self.is_dense:
            return UNLIMITED
        if num_tokens < self.dense_prefix_size:
            return self.dense_prefix_size - num_tokens
        return self.lag_size - (num_tokens - self.sink_size) % self.lag_size

    def said(self) -> str:
        return "dense" if self.is_dense else f"retention {self.retention:g}" if self.retention else "window"

    @property
    def layers(self) -> "tuple[LRSAConfig, ...]":
        """These settings, as those of every layer; see `LayeredConfig` for layers that differ."""
        return (self,)

    def at_layer(self, index: int) -> "LRSAConfig":
        return self

    def at_retention(self, retention: float) -> "LRSAConfig":
        return replace(self, retention=retention)

    def saved(self) -> dict[str, Any]:
        """The settings to save in a model: `LRSAConfig(**saved)` equals this one.

        Settings that the first release did not have are included only if they differ from its behaviour.
        """
        added = {"selection": "lagkv", "value_weight": 1.0}
        return {key: value for key, value in asdict(self).items() if key not in added or value != added[key]}
