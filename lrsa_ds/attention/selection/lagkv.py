"""LagKV (arXiv 2504.04704, equations 5 to 9): how much a token stands out from the next partition."""

import torch

from lrsa_ds.attention.selection.fused_lagkv import HAS_TRITON, fused_select_into
from lrsa_ds.attention.selection.rule import Candidates, SelectionRule


@torch.no_grad()
def lag_scores(partition: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Scores of the tokens of each partition by its lag reference, for keys or for values.

    Args:
        partition, reference: [..., L, D], L tokens of D channels.

    Returns:
        fp32 [..., L], summing to 1 over the tokens, without gradient.
    """
    low = reference.amin(dim=-2, keepdim=True).float()
    high = reference.amax(dim=-2, keepdim=True).float()
    # A channel that is constant in the reference cannot be normalised: divided by infinity, it counts as 0.
    spread = torch.where(high > low, high - low, torch.inf)
    deviation = ((partition.float() - low) / spread).std(dim=-1)
    # Nearly constant channels can overflow fp32: such a token gets the largest deviation instead of NaN.
    largest = torch.finfo(torch.float32).max
    return deviation.nan_to_num(nan=largest, posinf=largest).softmax(dim=-1)


def score(candidates: Candidates) -> torch.Tensor:
    """score(K) + value_weight * score(V); the authors' code calls the weight `score_v_ratio`."""
    of_keys = lag_scores(candidates.keys, candidates.key_reference)
    of_values = lag_scores(candidates.values, candidates.value_reference)
    return of_keys + candidates.value_weight * of_values


LAGKV = SelectionRule(
    score=score,
    reads=("keys", "values", "reference", "value_weight"),
    fused=fused_select_into if HAS_TRITON else None,
)
