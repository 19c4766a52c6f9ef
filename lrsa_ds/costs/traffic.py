"""What a rank sends to other ranks in a step, in bytes, from integers: sequence parallelism and ZeRO.

Under sequence parallelism the counts are those of `lrsa_ds.parallel.sequence.traffic`, averaged over the ranks: a pass
that is recomputed sends again, and the backward pass sends the gradient of each number that the forward pass sent.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from lrsa_ds.costs.buffers import keys_of
from lrsa_ds.costs.job import Job
from lrsa_ds.costs.sizes import Sizes
from lrsa_ds.costs.weights import weight_bytes
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.layers import AnyConfig
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.traffic import ulysses_bytes
from lrsa_ds.registry import EXCHANGES

FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes of a rank in a step: of the sequence by cargo, and of ZeRO by what it sends."""

    sequence: dict[str, float]
    zero: dict[str, float]


def traffic_of(sizes: Sizes, job: Job, config: AnyConfig) -> Traffic:
    return Traffic(sequence_bytes(sizes, job, config), zero_bytes(sizes, job))


def sequence_bytes(sizes: Sizes, job: Job, config: AnyConfig) -> dict[str, float]:
    """Bytes of all layers and passes under these settings, by cargo; empty without sequence parallelism."""
    if job.sp_size == 1:
        return {}
    total: defaultdict[str, float] = defaultdict(float)
    for index, layer in enumerate(sizes.shape.layers):
        times = job.grad_accum * (1 + layer.attention_has_gradient * (1 + job.checkpointing))
        for cargo, count in pass_bytes(sizes, job, config.at_layer(index)).items():
            total[cargo] += times * count
        for taught in job.taught:
            for cargo, count in pass_bytes(sizes, job, taught.at_layer(index)).items():
                total[cargo] += job.grad_accum * count
    return dict(total)


def pass_bytes(sizes: Sizes, job: Job, config: LayerSettings) -> dict[str, float]:
    """Bytes that a rank sends in one pass over a layer, on average over the ranks."""
    n, b, ranks = job.num_tokens, job.itemsize, job.sp_size
    others = (ranks - 1) / ranks
    keys, entry = keys_of(job, config), 2 * sizes.head_dim * b
    halo = keys.halos_sent / ranks * sizes.num_kv_heads * entry
    if not isinstance(config, LRSAConfig):
        return {"halo": halo}
    if config.is_dense:
        q, k = (torch.empty(1, h, n, sizes.head_dim, dtype=_dtype(b), device="meta") for h in _heads(sizes))
        return {cargo: float(count) for cargo, count in ulysses_bytes(q, k, k, ranks).items()}
    if not EXCHANGES[job.exchange].merges_parts:  # each rank sends what it keeps to every other
        return {"halo": halo, "kept": keys.kept * others * sizes.num_kv_heads * entry}
    if not keys.kept:
        return {"halo": halo}
    queries = others * n * sizes.num_heads * sizes.head_dim * b
    # A rank receives the KV heads that its query heads read, where they are fewer than ranks one of them.
    kept = keys.kept * others * max(sizes.num_kv_heads / ranks, 1) * entry
    return {
        "halo": halo,
        "queries": queries,
        "kept": kept,
        "outputs": queries,
        "lse": others * n * sizes.num_heads * FP32,
    }


def _heads(sizes: Sizes) -> tuple[int, int]:
    return sizes.num_heads, sizes.num_kv_heads


def _dtype(itemsize: int) -> torch.dtype:
    return torch.float32 if itemsize == FP32 else torch.bfloat16


def zero_bytes(sizes: Sizes, job: Job) -> dict[str, float]:
    """Bytes that ZeRO sends from a rank in a step.

    A collective over shards sends (P - 1) / P of the whole from each rank. Stage 3 gathers the weights for the forward
    and for the backward pass of every micro-batch and scatters the sums of its gradients; the stages before it sum
    gradients by all-reduce, twice as much, stage 1 once a step, and gather the new weights once a step.
    """
    others = (job.num_gpus - 1) / job.num_gpus
    if not others:
        return {}
    weights = others * weight_bytes(sizes, job)
    trained = others * job.itemsize * sizes.num_trained
    if job.stage == 3:
        return {"weights": 2 * job.grad_accum * weights, "gradients": job.grad_accum * trained}
    return {"weights": trained, "gradients": 2 * trained * (job.grad_accum if job.stage == 2 else 1)}
