"""Keys and values in one tensor, as they are sent between ranks.

Shapes: G KV heads, n tokens, D head dim of the keys, D' of the values.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class KeysAndValues:
    """The head dims of keys and values. If they differ, the smaller one is padded with zeros."""

    num_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor) -> "KeysAndValues":
        return cls(k.shape[1], k.shape[3], v.shape[3])

    @property
    def dim(self) -> int:
        return max(self.key_dim, self.value_dim)

    def shape(self, num_tokens: int) -> tuple[int, ...]:
        """That of `stack` for so many tokens."""
        return 2, self.num_heads, num_tokens, self.dim

    def stack(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """From [1, G, n, D] and [1, G, n, D'] to [2, G, n, max(D, D')]."""
        return torch.stack([pad(x[0], (0, self.dim - x.shape[3])) for x in (k, v)])

    def unstack(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [1, G, n, D] and values [1, G, n, D'] of [2, G, n, max(D, D')]."""
        k, v = both[:, None]
        return k[..., : self.key_dim], v[..., : self.value_dim]
