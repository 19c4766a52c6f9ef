"""Attention behind a cache as one operator, `torch.ops.lrsa_ds.attend_pass`, for a compiler of the model around it.

How many tokens a cache holds and where chunks end differs from pass to pass. The operator asks the pass that is under
way, and the compiler sees none of it: what it compiles serves all caches and numbers of tokens.

Shapes: B rows, H query heads, G KV heads, n tokens, D head dim of keys, D' of values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from lrsa_ds.attention.extras import Extras

# From q [B, H, n, D], k [B, G, n, D] and v [B, G, n, D'] of the new tokens, the layer and its extras to [B, H, n, D'].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, Extras], torch.Tensor]


class OpaquePass:
    """The tokens of a pass whose attention a compiler does not look into.

    Args:
        positions: int64 [B or 1, n], of the tokens in their rows.
        attend: caches the new keys and values, and attends.
    """

    def __init__(self, positions: torch.Tensor, attend: Attend):
        self.positions, self._attend = positions, attend

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """As long as the model runs."""
        token = _UNDER_WAY.set(self._attend)
        try:
            yield
        finally:
            _UNDER_WAY.reset(token)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, extras: Extras) -> torch.Tensor:
        """Attention of the new tokens in a layer: [B, H, n, D']."""
        return _attend_pass(q, k, v, layer, extras.scale, extras.softcap, extras.sinks).transpose(1, 2)


_UNDER_WAY: ContextVar[Attend] = ContextVar("the attention of the pass that is under way")


@torch.library.custom_op("lrsa_ds::attend_pass", mutates_args=())
def _attend_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[B, n, H, D'], which no input shares memory with."""
    found = _UNDER_WAY.get()(q, k, v, layer, Extras(scale, softcap, sinks))
    return found.transpose(1, 2).contiguous()


@_attend_pass.register_fake
def _(q, k, v, layer, scale, softcap, sinks):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("lrsa_ds::stored", mutates_args=())
def stored(x: torch.Tensor) -> torch.Tensor:
    """A copy, which a compiler stores and reads instead of computing `x` again wherever it is used."""
    return x.clone()


@stored.register_fake
def _(x):
    return torch.empty_like(x)
