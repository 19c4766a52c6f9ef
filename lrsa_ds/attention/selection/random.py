"""Keeps random tokens: a control for rules that read the tokens.

The draw is a function of seed, layer, KV head and position in the document. So a training pass, prefill and decoding
keep the same tokens, on every rank.
"""

import torch

from lrsa_ds.attention.selection.rule import Candidates, SelectionRule

BITS = 2**32 - 1


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hashes numbers of 32 bits; int64, so that no product overflows."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & BITS
    return x ^ (x >> 16)


def random_rule(seed: int) -> SelectionRule:
    """A rule that draws with `seed`, a number of 32 bits."""

    def score(candidates: Candidates) -> torch.Tensor:
        heads = torch.arange(candidates.num_heads, device=candidates.device)[:, None, None]
        drawn = mix(heads.new_tensor(seed))
        for source in (candidates.layer, heads, candidates.positions):
            drawn = mix((drawn + source) & BITS)
        return (drawn >> 8).float()  # 24 bits, which fp32 holds exactly

    return SelectionRule(score=score)


RANDOM = random_rule(seed=0)
