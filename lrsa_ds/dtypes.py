"""Dtypes by the names that configurations and messages use."""

import torch


def dtype_of(setting: str) -> torch.dtype:
    """The dtype that `model.dtype` names; "auto" is bf16 on CUDA and fp32 elsewhere."""
    automatic = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"auto": automatic, "bf16": torch.bfloat16, "fp32": torch.float32}[setting]


def dtype_setting(dtype: torch.dtype) -> str:
    """The value of `model.dtype` that names a dtype."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
