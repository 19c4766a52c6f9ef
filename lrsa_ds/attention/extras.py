"""What attention does to its scores beside the softmax over the visible keys: a scale, a cap, learned sinks.

Shapes: B batch, H query heads, N queries, M keys, D head dim.
"""

from dataclasses import dataclass, replace

import torch

from lrsa_ds.errors import require


@dataclass(frozen=True, eq=False)
class Extras:
    """How a layer makes weights of its scores.

    Args:
        scale: factor of the scores; None: 1 / sqrt(D).
        softcap: c, if each scaled score s becomes c tanh(s / c) (Gemma 2).
        sinks: [H], for each query head a learned score beside those of the keys, which takes its share of the weights
            and has no value (gpt-oss). Kernels leave it to `with_sinks`.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None

    def scale_of(self, head_dim: int) -> float:
        """The factor of the scores of queries and keys of `head_dim` channels."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def capped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scaled scores under the cap."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def with_sinks(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, H, N, D] and log-sum-exp [B, H, N] once the sinks have taken their share; differentiable.

        To be applied once to each query: where parts are merged, to one that sees a key of every query.
        """
        if self.sinks is None:
            return out, lse
        lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        sinks = self.sinks.to(lse.dtype)[:, None]
        share = torch.sigmoid(lse - sinks)[..., None]
        return (out * share).to(out.dtype), torch.logaddexp(lse, sinks)

    def of_heads(self, heads: slice) -> "Extras":
        """Those of some of the query heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[heads])


PLAIN = Extras()


def extras_of(scale: float | None, extras: Extras | None) -> Extras:
    """What a caller gave: a scale alone, or all of them.

    Raises:
        LRSAError: both.
    """
    require(scale is None or extras is None, "give scale, or extras=Extras(scale=...), not both.")
    return Extras(scale) if extras is None else extras
