"""Which kernel computes interval attention, by device and settings."""

import torch

from lrsa_ds.attention.fa4 import fa4_interval_attention, why_not_fa4
from lrsa_ds.attention.flex import flex_interval_attention
from lrsa_ds.attention.interval import interval_attention
from lrsa_ds.config import LRSAConfig, require
from lrsa_ds.notices import say_once

# By name: functions with the signature of `interval_attention`.
KERNELS = {"chunked": interval_attention, "flex": flex_interval_attention, "fa4": fa4_interval_attention}


def choose_backend(config: LRSAConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend for such tensors; "auto" is the fastest that can take them.

    Raises:
        LRSAError: the backend that the settings name cannot.
    """
    if config.backend == "auto":
        if device.type != "cuda":
            return "chunked"
        reason = why_not_fa4(device, dtype, head_dim)
        if reason is not None:
            say_once(f"attention.backend=auto is flex here, since fa4 is not possible: {reason}.")
        return "fa4" if reason is None else "flex"
    require(
        config.backend != "flex" or device.type == "cuda",
        f"attention.backend=flex needs a CUDA device, and this is {device}: use auto or chunked.",
    )
    reason = why_not_fa4(device, dtype, head_dim) if config.backend == "fa4" else None
    require(reason is None, f"attention.backend=fa4 is not possible: {reason}; use auto, flex or chunked.")
    return config.backend
