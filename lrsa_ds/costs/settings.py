"""Settings of `launch/plan.py`: those of a run, and of the machine that it is planned for."""

from dataclasses import dataclass
from typing import Any

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.gpus import gpu_of_setting
from lrsa_ds.costs.plan import NETWORK_GB_S, Machine
from lrsa_ds.errors import require, require_whole


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    """A run that is planned.

    Args:
        gpu: a name in the table of `lrsa_ds.costs.gpus`, or its figures, such as {memory_gb: 48, peak_tflops: 200}.
        gpus: of all hosts; None for as many as share a sequence.
        gpus_per_node: GPUs of a host.
        network_gb_s: from a GPU to one of another host, in one direction.
        host_memory_gb: of a host, in 1e9 bytes; None for no limit.
        num_targets: target tokens of a sequence; None for `loss_chunk_size`.
        compare: a CSV file of launch/benchmark_steps.py, whose rows are shown beside the estimates.
    """

    gpu: Any = "h100"
    gpus: int | None = None
    gpus_per_node: int = 8
    network_gb_s: float = NETWORK_GB_S
    host_memory_gb: float | None = None
    num_targets: int | None = None
    compare: str | None = None

    def __post_init__(self):
        super().__post_init__()
        gpu_of_setting(self.gpu)
        for key in ("gpus", "num_targets"):
            if getattr(self, key) is not None:
                require_whole(key, getattr(self, key), 1)
        require_whole("gpus_per_node", self.gpus_per_node, 1)
        for key in ("network_gb_s", "host_memory_gb"):
            value = getattr(self, key)
            require(value is None or value > 0, f"{key}={value} is not valid: give a number above 0.")

    @property
    def itemsize(self) -> int:
        """Bytes of a weight: on a GPU model.dtype=auto is bf16."""
        return 4 if self.model.dtype == "fp32" else 2

    @property
    def num_gpus(self) -> int:
        return self.gpus or self.parallel.sp_size

    @property
    def machine(self) -> Machine:
        name = self.gpu.lower() if isinstance(self.gpu, str) else f"GPU of {self.gpu['memory_gb']:g} GB"
        gpu = gpu_of_setting(self.gpu)
        return Machine(name, gpu, self.num_gpus, self.gpus_per_node, self.network_gb_s, self.host_memory_gb)
