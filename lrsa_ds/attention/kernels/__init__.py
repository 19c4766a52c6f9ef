"""Kernels of interval attention: the table, from the readable kernel to the fastest.

To add a kernel, write a file with a function like `interval_attention` and add it here with its traits.
"""

import torch

from lrsa_ds.attention.kernels.fa4 import KEYS_IN_BLOCK, fa4_interval_attention, what_fa4_misses
from lrsa_ds.attention.kernels.flex import flex_interval_attention
from lrsa_ds.attention.kernels.interval import interval_attention
from lrsa_ds.attention.kernels.kernel import Kernel
from lrsa_ds.registry import KERNELS

KERNELS.add(
    "chunked",
    Kernel(
        attend=interval_attention,
        is_readable=True,
        wants_whole_blocks=False,
        takes_other_value_dims=True,
        caps_scores=True,
    ),
)
KERNELS.add(
    "flex",
    Kernel(
        attend=flex_interval_attention,
        compiles_shapes=True,
        devices=("cuda",),
        min_head_dim=16,
        takes_other_value_dims=True,
        caps_scores=True,
    ),
)
KERNELS.add(
    "fa4",
    Kernel(
        attend=fa4_interval_attention,
        skips_queries_ahead=True,
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=tuple(KEYS_IN_BLOCK),
        what_is_missing=what_fa4_misses,
    ),
)
