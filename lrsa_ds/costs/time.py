"""How long a step takes: its operations and bytes, over what the kernels and links of a GPU reach in practice.

Each share below is a measurement of one kind of work on an H100 against the figure of its maker, not a fit to whole
steps: see benchmarks/results/2026-11-24-h100.md ("Where a step on one GPU goes") and 2026-11-25-h100.md.
"""

from dataclasses import dataclass

from lrsa_ds.costs.flops import step_flops
from lrsa_ds.costs.gpus import GPU
from lrsa_ds.costs.job import Job
from lrsa_ds.costs.memory import saved_attention_bytes
from lrsa_ds.costs.sizes import Sizes
from lrsa_ds.costs.traffic import traffic_of
from lrsa_ds.costs.weights import dequantizing_bytes
from lrsa_ds.layers import AnyConfig

# 1.27e15 operations in 1.76 s, of 989 TFLOPS: the matrices of a 1.5B model over 131,072 tokens.
MATRIX_SHARE = 0.73
# The bytes that `small_kernel_bytes` counts in a step of that model, with and without Liger's kernels, by the time
# that matrices and attention leave of it, of 3,350 GB/s: 0.59 and 0.53.
MEMORY_SHARE = 0.55
# An all-to-all of 64 to 256 MiB a rank between two H100s of a host: 233 to 261 of 450 GB/s.
LINK_SHARE = 0.55
# Pinned copies over PCIe, less the headers of its packets; not measured here.
HOST_SHARE = 0.8
# 1e9 bytes a second that DeepSpeed's CPUAdam moves on a host, all its ranks together; not measured here.
HOST_MEMORY_GB_S = 100.0
# Bytes of the optimizer for a parameter: fp32 weight, gradient and both moments read, weight and moments written, the
# weight written once more in the dtype of the model.
ADAM_BYTES = 4 * 7 + 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by kind of work, each the sum over its micro-batches."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(sizes: Sizes, job: Job, gpu: GPU, network_gb_s: float) -> StepTime | None:
    """The time of a step, the mean over the settings that steps take in turn; None if the GPU's speed is not known.

    Args:
        network_gb_s: from a GPU to one of another host, in one direction.
    """
    if not gpu.peak_tflops or not gpu.memory_gb_s:
        return None
    times = [_time_under(sizes, job, gpu, network_gb_s, config) for config in job.turns]
    return StepTime({name: sum(each[name] for each in times) / len(times) for name in times[0]})


def _time_under(sizes: Sizes, job: Job, gpu: GPU, network_gb_s: float, config: AnyConfig) -> dict[str, float]:
    slots = job.num_targets * job.micro_batch
    flops = step_flops(sizes.shape, job.passes, job.document_lengths, slots, config).executed
    each = job.grad_accum / job.sp_size  # of the operations over a row that a rank does in a step
    peak = gpu.peak_tflops * 1e12
    sent = traffic_of(sizes, job, config)
    matrices = flops.matrices * each / (peak * MATRIX_SHARE)
    attention = flops.attention * each / (peak * gpu.attention_share)
    small = small_kernel_bytes(sizes, job) * job.grad_accum / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    dequantized = dequantizing_bytes(sizes, job) * job.grad_accum / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    computing = matrices + attention + small + dequantized
    exchange = sum(sent.sequence.values()) / _link(gpu, network_gb_s, job.sp_size > job.gpus_per_node)
    # ZeRO gathers and scatters behind the computation: what takes longer than that is waited for.
    zero = sum(sent.zero.values()) / _link(gpu, network_gb_s, job.num_gpus > job.gpus_per_node)
    return {
        "matrices": matrices,
        "attention": attention,
        "norms and other small kernels": small,
        "4-bit weights, dequantized": dequantized,
        "exchange of sequences": exchange,
        "ZeRO, beyond the computation": max(0.0, zero - computing),
        "copies of checkpoints, beyond the computation": _waiting_for_copies(sizes, job, gpu, computing),
        "optimizer": _optimizer_time(sizes, job, gpu),
    }


def _link(gpu: GPU, network_gb_s: float, leaves_host: bool) -> float:
    """Bytes a second from one rank to others."""
    return (min(gpu.link_gb_s, network_gb_s) if leaves_host else gpu.link_gb_s) * 1e9 * LINK_SHARE


def small_kernel_bytes(sizes: Sizes, job: Job) -> float:
    """Bytes that a rank's kernels between the matrices and attention read and write in a micro-batch.

    Counted operator by operator, in elements for each token and layer: C hidden size, Q and K query and key channels, I
    width of the MLP. Written out, a norm goes 18 times over its C elements forward (those in fp32 count twice) and 42
    times back, the rotary embedding 10 and 13 times, the gated activation 5 and 9; Liger's kernels 2 and 3, 2 and 2, 3
    and 5. Residuals are added and their gradients summed, those of matrices with the same input too.
    """
    c, i = sizes.hidden_size, sizes.mlp_width
    q, k = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    norm, rotary, gated = ((2, 3), (2, 2), (3, 5)) if job.fused else ((18, 42), (10, 13), (5, 9))
    norms = sizes.num_norms * c + sizes.has_head_norms * (q + k)
    copies = 6 * k  # keys and values, read twice and written once, for the selection
    forward = norm[0] * norms + 6 * c + rotary[0] * (q + k) + copies + gated[0] * i
    backward = norm[1] * norms + 15 * c + rotary[1] * (q + k) + 3 * q + copies + gated[1] * i
    layers = sum(
        forward * (1 + layer.has_gradient * job.checkpointing) + backward * layer.has_gradient
        for layer in sizes.shape.layers
    )
    return job.num_tokens * job.itemsize * (layers + len(job.taught) * sizes.num_layers * forward)


def _waiting_for_copies(sizes: Sizes, job: Job, gpu: GPU, computing: float) -> float:
    """Checkpoints leave behind the forward pass, about a quarter of the computation, and come back behind the rest."""
    if not job.levers.offload_checkpoints:
        return 0.0
    layer = job.num_tokens * sizes.hidden_size * job.itemsize + saved_attention_bytes(sizes, job)
    copy = job.grad_accum * layer * sizes.num_layers / (gpu.host_gb_s * 1e9 * HOST_SHARE)
    return max(0.0, copy - computing / 4) + max(0.0, copy - computing * 3 / 4)


def _optimizer_time(sizes: Sizes, job: Job, gpu: GPU) -> float:
    """AdamW over a rank's shard: on the GPU, or on the host, whose ranks share its memory; weights come back then."""
    shard = sizes.num_trained / job.num_gpus
    if not job.levers.offload_optimizer:
        return shard * ADAM_BYTES / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    ranks = min(job.num_gpus, job.gpus_per_node)
    on_host = ranks * shard * ADAM_BYTES / (HOST_MEMORY_GB_S * 1e9)
    return on_host + shard * job.itemsize / (gpu.host_gb_s * 1e9 * HOST_SHARE)
