"""The interface of a strategy of sequence parallelism: which rank holds which tokens, attention, and limits.

A sequence is cut into equal stretches; each rank holds one or several of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.errors import require
from lrsa_ds.lrsa_config import LRSAConfig


@dataclass(frozen=True)
class Sharing:
    """Everything that may limit `parallel.sp_size`.

    Args:
        size: number of ranks that share a sequence.
        num_tokens: length of the sequence; `key` names the settings that determine it.
        num_heads, num_kv_heads: of the model.
        config: settings of the attention.
    """

    size: int
    num_tokens: int
    key: str
    num_heads: int
    num_kv_heads: int
    config: LRSAConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Strategy:
    """A strategy of sequence parallelism for LRSA.

    Args:
        name: its value of `parallel.exchange`.
        owners: from the number of ranks to the owner of each stretch, in the order of the tokens; all ranks own equally
            many.
        attend: `lrsa_attention` of the whole sequence for the queries of this rank. It takes (q, k, v, config,
            document_lengths, group, extras, layer); q, k and v are those of this rank's stretches, concatenated.
        check: raises LRSAError for a `Sharing` that the strategy does not support.
        merges_parts: whether it merges history and window by their log-sum-exp; the kernel then has to be
            differentiable through it.
    """

    name: str
    owners: Callable[[int], tuple[int, ...]]
    attend: Callable[..., torch.Tensor]
    check: Callable[[Sharing], None]
    merges_parts: bool = False

    @property
    def num_stretches(self) -> int:
        """Number of stretches that each rank holds."""
        return len(self.owners(1))

    def local_tokens(self, num_tokens: int, size: int, index: int) -> tuple[slice, ...]:
        """The stretches that rank `index` of `size` holds, in the order of the tokens."""
        return local_tokens(self.owners(size), num_tokens, index)

    def token_order(self, num_tokens: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens in the order of the ranks that hold them, and the inverse permutation.

        None if that is the order of the tokens in the sequence.
        """
        owners = self.owners(size)
        return None if owners == tuple(range(size)) else _token_order(owners, num_tokens, size, device)


def local_tokens(owners: tuple[int, ...], num_tokens: int, index: int) -> tuple[slice, ...]:
    """The stretches of rank `index`, in the order of the tokens, from the owner of each stretch."""
    length = num_tokens // len(owners)
    return tuple(slice(i * length, (i + 1) * length) for i, owner in enumerate(owners) if owner == index)


@lru_cache(maxsize=16)
def _token_order(
    owners: tuple[int, ...], num_tokens: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(num_tokens)
    order = torch.cat([tokens[part] for rank in range(size) for part in local_tokens(owners, num_tokens, rank)])
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
