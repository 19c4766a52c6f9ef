"""What a way to share a sequence over several ranks is: who holds which tokens, how they attend, what limits it.

A sequence is cut into equal stretches, one or several for each rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.config import LRSAConfig, require


@dataclass(frozen=True)
class Sharing:
    """A sequence that is to be shared, as far as it limits `parallel.sp_size`.

    Args:
        size: ranks.
        num_tokens: of the sequence; `key` is the name of the settings that decide it.
        num_heads, num_kv_heads: of the model.
        config: the attention.
    """

    size: int
    num_tokens: int
    key: str
    num_heads: int
    num_kv_heads: int
    config: LRSAConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Strategy:
    """A way to share a sequence under LRSA.

    Args:
        name: what `parallel.exchange` calls it.
        owners: from the number of ranks to the rank that holds each stretch, in the order of the tokens; all ranks hold
            as many.
        attend: `lrsa_attention` of the whole sequence for the queries of this rank; takes (q, k, v, config,
            document_lengths, group, scale, layer), the tensors of this rank's stretches one after the other.
        check: raises LRSAError for a `Sharing` that it cannot do.
        merges_parts: whether it merges history and window by their log-sum-exp, whose gradient the kernel has to give.
    """

    name: str
    owners: Callable[[int], tuple[int, ...]]
    attend: Callable[..., torch.Tensor]
    check: Callable[[Sharing], None]
    merges_parts: bool = False

    @property
    def num_stretches(self) -> int:
        """Stretches that one rank holds."""
        return len(self.owners(1))

    def held(self, num_tokens: int, size: int, index: int) -> tuple[slice, ...]:
        """The stretches that rank `index` of `size` holds, in the order of the tokens."""
        return held(self.owners(size), num_tokens, index)

    def token_order(self, num_tokens: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens in the order in which the ranks hold them, and where each token stands in it.

        None if that is the order of the tokens.
        """
        owners = self.owners(size)
        return None if owners == tuple(range(size)) else _token_order(owners, num_tokens, size, device)


def held(owners: tuple[int, ...], num_tokens: int, index: int) -> tuple[slice, ...]:
    """The stretches of rank `index`, in the order of the tokens, from the owner of each stretch."""
    length = num_tokens // len(owners)
    return tuple(slice(i * length, (i + 1) * length) for i, owner in enumerate(owners) if owner == index)


@lru_cache(maxsize=16)
def _token_order(
    owners: tuple[int, ...], num_tokens: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(num_tokens)
    order = torch.cat([tokens[part] for rank in range(size) for part in held(owners, num_tokens, rank)])
    return order.to(device), order.argsort().to(device)


def check_stretches(sharing: Sharing, strategy: Strategy) -> None:
    """Raises LRSAError unless each stretch is long enough for the halo of the next one."""
    halo, size, each = sharing.config.dense_prefix_size, sharing.size, strategy.num_stretches
    length = -(-sharing.num_tokens // (size * each))
    most = max(1, sharing.num_tokens // (halo * each))
    require(
        size == 1 or length >= halo,
        f"parallel.sp_size={size} with parallel.exchange={strategy.name} cuts {sharing.key} = {sharing.num_tokens:,} "
        f"tokens into stretches of {length:,}, and LRSA needs at least sink_size + 2 * lag_size = {halo:,}: give at "
        f"most {most}, or longer sequences.",
    )
