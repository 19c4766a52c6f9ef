"""What GPUs can do, by the figures of their makers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lrsa_ds.errors import require


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU.

    Args:
        memory_gb: 1e9 bytes that a program can have.
        peak_tflops: dense bf16 with fp32 sums, half of what makers give for sparse matrices; 0 if it is not known.
        link_gb_s: to another GPU of the host, in one direction, half of what makers give for both.
        host_gb_s: to host memory, in one direction.
    """

    memory_gb: float
    peak_tflops: float = 0.0
    link_gb_s: float = 32.0
    host_gb_s: float = 32.0


@dataclass(frozen=True)
class KnownGPU:
    """A GPU of the table: its name in torch, as a regular expression, and the source of its figures."""

    gpu: GPU
    device: str
    source: str


def _known(memory: float, peak: float, link: float, host: float, device: str, source: str) -> KnownGPU:
    return KnownGPU(GPU(memory_gb=memory, peak_tflops=peak, link_gb_s=link, host_gb_s=host), device, source)


# PCIe: GB/s of 16 lanes in one direction. Memory: what CUDA shows of an H100 80GB is 85.0 (80 GiB less what is
# reserved); that of the others is what their makers give.
PCIE4, PCIE5 = 32, 64
GPUS: dict[str, KnownGPU] = {
    "a100-40gb": _known(40, 312, 300, PCIE4, r"A100.*40GB", "NVIDIA A100 datasheet"),
    "a100": _known(80, 312, 300, PCIE4, r"A100.*80GB", "NVIDIA A100 datasheet"),
    "h100": _known(85, 989.4, 450, PCIE5, r"H100 80GB HBM3", "NVIDIA H100 datasheet, SXM; memory as CUDA shows it"),
    "h100-pcie": _known(80, 756, PCIE5, PCIE5, r"H100 PCIe", "NVIDIA H100 datasheet, PCIe, without a bridge"),
    "h100-nvl": _known(94, 835, 300, PCIE5, r"H100 NVL", "NVIDIA H100 NVL datasheet"),
    "h200": _known(141, 989.4, 450, PCIE5, r"H200", "NVIDIA H200 datasheet, SXM"),
    "b200": _known(180, 2250, 900, PCIE5, r"B200", "NVIDIA DGX B200 datasheet, an eighth"),
    "l40s": _known(48, 362, PCIE4, PCIE4, r"L40S", "NVIDIA L40S datasheet"),
    "l4": _known(24, 121, PCIE4, PCIE4, r"L4$", "NVIDIA L4 datasheet"),
    "a10": _known(24, 125, PCIE4, PCIE4, r"A10$", "NVIDIA A10 datasheet"),
    "a6000": _known(48, 154.8, PCIE4, PCIE4, r"RTX A6000", "NVIDIA RTX A6000 datasheet"),
    "rtx-4090": _known(24, 165.2, PCIE4, PCIE4, r"RTX 4090", "NVIDIA Ada GPU architecture whitepaper"),
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
    if isinstance(value, str):
        require(
            value.lower() in GPUS,
            f"gpu={value} is not known: choose one of {', '.join(GPUS)}, or give its figures, such as "
            "gpu='{memory_gb: 48, peak_tflops: 200}'.",
        )
        return GPUS[value.lower()].gpu
    for key, figure in value.items():
        number = isinstance(figure, (int, float)) and not isinstance(figure, bool)
        require(key in keys, f"gpu.{key} is not a figure of a GPU: give {', '.join(keys)}.")
        require(number and figure > 0, f"gpu.{key}={figure!r} is not valid: give a number above 0.")
    require("memory_gb" in value, f"gpu={dict(value)} has no memory_gb: give it, and what else is known: {keys[1:]}.")
    return GPU(**{str(key): float(figure) for key, figure in value.items()})
