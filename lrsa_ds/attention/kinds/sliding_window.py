"""Layers with a sliding window: each token sees itself and the `window` - 1 tokens before it (Mistral, Gemma, ...)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lrsa_ds.attention.kinds.local import LocalSettings, local_kind
from lrsa_ds.errors import require_whole


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(LocalSettings):
    """The settings of such a layer; `window` counts the token itself, as `sliding_window` of transformers does."""

    kind: ClassVar[str] = "sliding_window"

    window: int

    def __post_init__(self):
        require_whole("sliding_window", self.window, 1)

    @property
    def reach(self) -> int:
        return self.window - 1

    def first_seen(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens - self.reach).clamp(min=0)

    def said(self) -> str:
        return f"a sliding window of {self.window:,} token{'s' * (self.window > 1)}"


def read(config: Any) -> SlidingWindow:
    return SlidingWindow(window=config.sliding_window)


SLIDING_WINDOW = local_kind("sliding_attention", read)
