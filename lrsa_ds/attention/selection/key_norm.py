"""Keeps the keys with the lowest norm, which attract attention (arXiv 2406.11430); LagKV's authors compare with it."""

import torch

from lrsa_ds.attention.selection.rule import Candidates, SelectionRule


def score(candidates: Candidates) -> torch.Tensor:
    # Rotary embedding preserves norms: in the first layer a repeated token has the same norm except for rounding, which
    # differs between passes. In bf16 such tokens tie.
    norms = candidates.keys.float().norm(dim=-1)
    return -norms.bfloat16().float()


KEY_NORM = SelectionRule(score=score, reads=("keys",))
