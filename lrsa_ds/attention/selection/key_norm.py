"""The keys of the lowest norm (arXiv 2406.11430), which attract attention; LagKV's authors compare with this rule."""

import torch

from lrsa_ds.attention.selection.rule import Candidates, SelectionRule


def score(candidates: Candidates) -> torch.Tensor:
    norms = candidates.keys.float().norm(dim=-1)
    # Rotary embedding leaves the norm as it is: a token that comes twice has the same one in the first layer, but for
    # rounding, which differs from pass to pass. In bf16 the two tie.
    return -norms.bfloat16().float()


KEY_NORM = SelectionRule(score=score, reads=("keys",))
