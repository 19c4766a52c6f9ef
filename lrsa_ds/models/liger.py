"""Liger's fused kernels for the layers between matrix multiplications: norms, rotary embedding, gated MLP."""

import importlib.util

import torch
from transformers import PreTrainedModel

from lrsa_ds.errors import require
from lrsa_ds.settings.model import ModelConfig


def check_liger(model: ModelConfig, model_type: str) -> None:
    """Raises LRSAError if Liger's kernels are asked for but not available for models of this type, or not installed."""
    if not model.liger_kernel:
        return
    require(
        torch.cuda.is_available(), "model.liger_kernel=true needs a CUDA device, and there is none: set it to false."
    )
    require(
        importlib.util.find_spec("liger_kernel") is not None,
        "model.liger_kernel=true needs Liger: pip install 'lrsa-ds[liger]', or set it to false.",
    )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    require(
        model_type in MODEL_TYPE_TO_APPLY_LIGER_FN,
        f"model.liger_kernel=true: Liger has no kernels for the model type {model_type}, only for "
        f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}; set it to false.",
    )


def apply_liger(model: PreTrainedModel) -> None:
    """Installs the kernels in the model, in place. The loss stays that of the objective, which knows the targets."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
