"""Which tokens of a sequence each of the ranks that share it holds.

`parallel.exchange=heads`: rank s holds the s-th of P equal stretches. `kept`: it holds the s-th of 2P equal stretches
and the s-th from the end, so that the queries of all ranks see as much history: late tokens see more than early ones.
"""

from functools import lru_cache

import torch

from lrsa_ds.config import LRSAConfig, require


def num_stretches(exchange: str) -> int:
    """Stretches that one rank holds."""
    return 2 if exchange == "kept" else 1


def owners(size: int, exchange: str) -> tuple[int, ...]:
    """The rank that holds each stretch, in the order of the tokens."""
    ranks = tuple(range(size))
    return ranks + ranks[::-1] if exchange == "kept" else ranks


def held(num_tokens: int, size: int, index: int, exchange: str) -> tuple[slice, ...]:
    """The stretches that rank `index` of `size` holds, in the order of the tokens."""
    length = num_tokens // (size * num_stretches(exchange))
    numbers = (i for i, owner in enumerate(owners(size, exchange)) if owner == index)
    return tuple(slice(i * length, (i + 1) * length) for i in numbers)


@lru_cache(maxsize=16)
def token_order(num_tokens: int, size: int, exchange: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens in the order in which the ranks hold them, rank after rank, and where each token stands in it."""
    tokens = torch.arange(num_tokens)
    order = torch.cat([tokens[part] for rank in range(size) for part in held(num_tokens, size, rank, exchange)])
    return order.to(device), order.argsort().to(device)


def check_stretches(num_tokens: int, size: int, config: LRSAConfig, key: str, exchange: str) -> None:
    """Raises LRSAError unless `num_tokens` tokens shared by `size` ranks leave each stretch long enough for a halo."""
    halo = config.dense_prefix_size
    each = num_stretches(exchange)
    length = -(-num_tokens // (size * each))
    most = max(1, num_tokens // (halo * each))
    require(
        size == 1 or length >= halo,
        f"parallel.sp_size={size} with parallel.exchange={exchange} cuts {key} = {num_tokens:,} tokens into stretches "
        f"of {length:,}, and LRSA needs at least sink_size + 2 * lag_size = {halo:,}: give at most {most}, or longer "
        "sequences.",
    )
