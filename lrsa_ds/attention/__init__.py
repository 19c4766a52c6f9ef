from collections.abc import Callable

import torch

from lrsa_ds.attention.lrsa import lrsa_attention
from lrsa_ds.attention.select import select_kept

# The signature of `lrsa_attention`.
AttentionFunction = Callable[..., torch.Tensor]

__all__ = ["AttentionFunction", "lrsa_attention", "select_kept"]
