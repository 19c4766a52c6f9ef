"""What GPUs can do, by the figures of their makers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lrsa_ds.errors import require

# Kernels against the peak: flash-attn-4's, which run on Hopper, and FlexAttention's anywhere. LRSA over 131,072 tokens,
# 32/8 heads, forward and backward on an H100: 556 and 381 TFLOPS of 989 (benchmarks/results/2026-11-25-h100.md).
FA4, FLEX = 0.56, 0.38
SHARE_OF_KERNEL = {"fa4": FA4, "flex": FLEX}


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU.

    Args:
        memory_gb: 1e9 bytes that a program can have.
        peak_tflops: dense bf16 with fp32 sums, half of what makers give for sparse matrices; 0 if it is not known.
        memory_gb_s: to its own memory; 0 if it is not known.
        link_gb_s: to another GPU of the host, in one direction, half of what makers give for both.
        host_gb_s: to host memory, in one direction.
        attention_share: of the peak, that the kernels of attention reach.
    """

    memory_gb: float
    peak_tflops: float = 0.0
    memory_gb_s: float = 0.0
    link_gb_s: float = 32.0
    host_gb_s: float = 32.0
    attention_share: float = FLEX


@dataclass(frozen=True)
class KnownGPU:
    """A GPU of the table: its name in torch, as a regular expression, and the source of its figures."""

    gpu: GPU
    device: str
    source: str


def _known(
    memory: float, peak: float, memory_gb_s: float, link: float, host: float, device: str, source: str, kernel=FLEX
) -> KnownGPU:
    figures = {"memory_gb": memory, "peak_tflops": peak, "memory_gb_s": memory_gb_s}
    return KnownGPU(GPU(**figures, link_gb_s=link, host_gb_s=host, attention_share=kernel), device, source)


# PCIe: GB/s of 16 lanes in one direction. Memory: what CUDA shows of an H100 80GB is 85.0 (80 GiB less what is
# reserved); that of the others is what their makers give. Peaks of datasheets that give them for sparse matrices only
# (H100: 1,979 and 1,513, H100 NVL: 1,671, H200: 1,979, L4: 242) are halved; 989.4 is in the Hopper whitepaper.
PCIE4, PCIE5 = 32, 64
DATASHEETS = "https://www.nvidia.com/en-us/data-center"
GPUS: dict[str, KnownGPU] = {
    "a100-40gb": _known(40, 312, 1555, 300, PCIE4, r"A100.*40GB", f"{DATASHEETS}/a100: A100 40GB SXM"),
    "a100": _known(80, 312, 2039, 300, PCIE4, r"A100.*80GB", f"{DATASHEETS}/a100: A100 80GB SXM"),
    "h100": _known(85, 989.4, 3350, 450, PCIE5, r"H100 80GB HBM3", f"{DATASHEETS}/h100: H100 SXM", FA4),
    "h100-pcie": _known(80, 756, 2000, PCIE5, PCIE5, r"H100 PCIe", f"{DATASHEETS}/h100: PCIe, without a bridge", FA4),
    "h100-nvl": _known(94, 835, 3900, 300, PCIE5, r"H100 NVL", f"{DATASHEETS}/h100: H100 NVL", FA4),
    "h200": _known(141, 989.4, 4800, 450, PCIE5, r"H200", f"{DATASHEETS}/h200: H200 SXM", FA4),
    "b200": _known(180, 2250, 8000, 900, PCIE5, r"B200", f"{DATASHEETS}/dgx-b200: an eighth of DGX B200"),
    "l40s": _known(48, 362, 864, PCIE4, PCIE4, r"L40S", f"{DATASHEETS}/l40s"),
    "l4": _known(24, 121, 300, PCIE4, PCIE4, r"L4$", f"{DATASHEETS}/l4"),
    "a10": _known(24, 125, 600, PCIE4, PCIE4, r"A10$", f"{DATASHEETS}/products/a10-gpu"),
    "a6000": _known(48, 154.8, 768, PCIE4, PCIE4, r"RTX A6000", "NVIDIA RTX A6000 datasheet, 309.7 for sparse ones"),
    "rtx-4090": _known(24, 165.2, 1008, PCIE4, PCIE4, r"RTX 4090", "NVIDIA Ada GPU architecture whitepaper, table 2"),
}


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU that torch calls `device_name`, if it is known."""
    return next((known.gpu for known in GPUS.values() if re.search(known.device, device_name)), None)


def gpu_of_setting(value: str | Mapping[str, Any]) -> GPU:
    """The GPU that a setting names, or describes with `memory_gb` and what else is known of it.

    Raises:
        LRSAError: the name, a key or a figure is not valid.
    """
    keys = [field.name for field in fields(GPU)]
    if not isinstance(value, Mapping):
        require(
            isinstance(value, str) and value.lower() in GPUS,
            f"gpu={value} is not known: choose one of {', '.join(GPUS)}, or give its figures, such as "
            "gpu='{memory_gb: 48, peak_tflops: 200}'.",
        )
        return GPUS[value.lower()].gpu
    for key, figure in value.items():
        number = isinstance(figure, (int, float)) and not isinstance(figure, bool)
        require(key in keys, f"gpu.{key} is not a property of a GPU: give {', '.join(keys)}.")
        require(number and figure > 0, f"gpu.{key}={figure!r} is not valid: give a number above 0.")
    require(
        "memory_gb" in value,
        f"gpu={dict(value)} has no memory_gb: give it, and what is known of {', '.join(keys[1:])}.",
    )
    return GPU(**{str(key): float(figure) for key, figure in value.items()})
