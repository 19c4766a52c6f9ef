"""The optimizers that a run may name, for DeepSpeed to wrap."""

import importlib.util
from typing import Any

import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import require


def check_optimizer(config: TrainConfig) -> None:
    """Raises LRSAError if the optimizer of the run needs a library that is not installed."""
    require(
        config.optim.name != "adamw_8bit" or importlib.util.find_spec("bitsandbytes") is not None,
        "optim.name=adamw_8bit needs bitsandbytes: pip install 'lrsa-ds[8bit]', or set optim.name=adamw.",
    )


def make_optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over groups of parameters: torch's, DeepSpeed's for states in host memory, or one with 8-bit states.

    8-bit states are quantized in blocks of 256 numbers, each with its own scale (Dettmers et al. 2021, arXiv
    2110.02861). Under ZeRO they are those of a rank's flat fp32 partition, in which a block may span two parameters.
    """
    optim, zero = config.optim, config.zero
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "weight_decay": optim.weight_decay,
    }
    if optim.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # an extra

        return AdamW8bit(groups, **settings)
    if zero.offload_optimizer == "cpu" or zero.offload_param == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled at first use, so imported only where it is used

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)
