"""Attention of a layer: LRSA in its forms, the selection of what is kept, and the kinds of layers beside it."""

from collections.abc import Callable

import torch

from lrsa_ds.attention.kinds.kind import layer_attention
from lrsa_ds.attention.lrsa import lrsa_attention
from lrsa_ds.attention.selection import SelectionRule, register_selection
from lrsa_ds.attention.selection.select import select_kept

# The signature of `lrsa_attention`, for layers of every kind.
AttentionFunction = Callable[..., torch.Tensor]

__all__ = [
    "AttentionFunction",
    "SelectionRule",
    "layer_attention",
    "lrsa_attention",
    "register_selection",
    "select_kept",
]
