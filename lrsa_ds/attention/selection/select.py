"""Selection of the tokens to keep of each partition, by the rule in the settings.

Shapes: B batch, G KV heads, N tokens, D head dim, P partitions, L lag size, K kept per partition.
"""

from functools import lru_cache

import torch

from lrsa_ds.attention.selection.rule import Candidates, Partitions
from lrsa_ds.errors import LRSAError
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.notices import say_once
from lrsa_ds.registry import SELECTION_RULES


def select_kept(k: torch.Tensor, v: torch.Tensor, config: LRSAConfig, layer: int = 0) -> torch.Tensor:
    """Positions kept of each partition that can become history: all complete partitions but the last.

    Args:
        k, v: keys and values of one document, [B, G, N, D] (their D may differ).
        layer: index of their layer in the model, for rules that depend on it.

    Returns:
        int64 [B, G, P, K], absolute positions, ascending; P is 0 for a document shorter than S + 2L.

    Source: LagKV, arXiv 2504.04704, section 3; ties go to the lower position.
    """
    num_partitions = max(0, (k.shape[2] - config.sink_size) // config.lag_size - 1)
    partitions = Partitions.adjacent(config.sink_size, num_partitions, config.lag_size, k.device)
    return select_partitions(k, v, partitions, config, layer)


@torch.no_grad()
def select_partitions(
    k: torch.Tensor, v: torch.Tensor, partitions: Partitions, config: LRSAConfig, layer: int
) -> torch.Tensor:
    """Positions kept of each partition, in PyTorch.

    Returns:
        int64 [B, G, P, K], positions in `k` and `v`, ascending.
    """
    shape = (*k.shape[:2], len(partitions), config.lag_size)
    if len(partitions) == 0 or config.num_kept == 0:
        return torch.empty(*shape[:3], config.num_kept, dtype=torch.int64, device=k.device)
    scores = SELECTION_RULES[config.selection].score(Candidates(k, v, partitions, config, layer))
    try:
        scores = scores.expand(shape)
    except RuntimeError as error:
        raise LRSAError(
            f"the selection rule {config.selection} gives scores of shape {list(scores.shape)}: give {list(shape)}."
        ) from error
    # A stable sort, since topk does not define which of two equal scores it takes.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : config.num_kept].sort(dim=-1).values
    return best + partitions.starts[:, None]


@torch.no_grad()
def fast_select_partitions(
    k: torch.Tensor, v: torch.Tensor, partitions: Partitions, config: LRSAConfig, layer: int
) -> torch.Tensor:
    """`select_partitions`, in the fused kernels of the rule if it has any for these tensors."""
    if len(partitions) == 0 or not has_fused_path(k, v, config):
        return select_partitions(k, v, partitions, config, layer)
    kept = torch.empty(*k.shape[:2], len(partitions), config.num_kept, dtype=torch.int64, device=k.device)
    slots = _slots(len(partitions), config.num_kept, k.device)
    SELECTION_RULES[config.selection].fused(kept.flatten(2), k, v, partitions, slots, config, layer)
    return kept


@lru_cache(maxsize=64)
def _slots(num_partitions: int, num_kept: int, device: torch.device) -> torch.Tensor:
    """The first slot of the kept KV of each partition, made once for all layers."""
    return num_kept * torch.arange(num_partitions, device=device)


def has_fused_path(k: torch.Tensor, v: torch.Tensor, config: LRSAConfig) -> bool:
    """Whether the rule has fused kernels for such tensors; prints once if it has none for a GPU."""
    if not k.is_cuda or config.num_kept == 0:
        return False
    if SELECTION_RULES[config.selection].fused is None:
        say_once(f"attention.selection={config.selection} has no fused GPU kernels: it runs in PyTorch, more slowly.")
        return False
    return k.shape == v.shape
