"""Layers of chunked attention (Llama 4): each token sees the tokens of its own attention chunk, up to itself.

A document is cut into attention chunks of equal size, counted from its first token. They have nothing to do with the
chunks of LRSA.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lrsa_ds.attention.kinds.local import LocalSettings, local_kind
from lrsa_ds.errors import require_whole


@dataclass(frozen=True, kw_only=True)
class ChunkedAttention(LocalSettings):
    """The settings of such a layer; `size` is the `attention_chunk_size` of transformers."""

    kind: ClassVar[str] = "chunked_attention"

    size: int

    def __post_init__(self):
        require_whole("attention_chunk_size", self.size, 1)

    @property
    def reach(self) -> int:
        return self.size - 1

    def first_seen(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens // self.size * self.size

    def said(self) -> str:
        return f"attention chunks of {self.size:,} token{'s' * (self.size > 1)}"


def read(config: Any) -> ChunkedAttention:
    return ChunkedAttention(size=config.attention_chunk_size)


CHUNKED_ATTENTION = local_kind("chunked_attention", read)
