"""What a rank holds in GPU and host memory during a step, part by part, from integers.

Static parts follow from ZeRO's stage and offload. A step has three moments at which most may be held: the backward
pass of the last layer, when all checkpoints are there; the loss, whose logits are as wide as the vocabulary; and the
optimizer, which takes gradients in fp32. The peak is the largest of them.

Letters: n tokens of a rank, b bytes of a weight, c hidden size. A *row* is n c numbers of b bytes. The formulas are
compared with real tensors in tests/cpu/test_costs.py, and with peaks of GPUs that benchmarks/results holds.
"""

from dataclasses import dataclass

from lrsa_ds.costs.buffers import keys_of
from lrsa_ds.costs.job import Job
from lrsa_ds.costs.sizes import Sizes
from lrsa_ds.costs.weights import dequantized_bytes, gathered_bytes, scale_bytes, weight_bytes
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.models.offload import attention_width
from lrsa_ds.registry import EXCHANGES

FP32 = 4
# DeepSpeed's defaults, in parameters: what ZeRO-3 holds gathered at most (stage3_max_live_parameters), since it lets
# nothing go that is used again within as many (stage3_max_reuse_distance), and what its optimizer takes at once.
MAX_LIVE = SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class GPUMemory:
    """Bytes of a rank. `static` is held all the time; of `moments` one after the other, the parts of each by name."""

    static: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.static.values()) + sum(self.moments[self.peak_moment].values())


def gpu_memory(sizes: Sizes, job: Job) -> GPUMemory:
    checkpoints = {"activation checkpoints": checkpoint_bytes(sizes, job)}
    layers = [layer_bytes(sizes, job, *each) for each in _different(sizes, job)]
    layer = max(layers, key=lambda parts: sum(parts.values()))
    layer["one layer: a dequantized matrix"] = dequantized_bytes(sizes, job)
    final_norm = job.num_tokens * sizes.hidden_size * _norm_saved(job)
    loss = {"final norm": final_norm, "logits": logits_bytes(sizes, job)}
    return GPUMemory(
        static_bytes(sizes, job),
        {
            "backward pass of a layer": checkpoints | layer,
            "loss": checkpoints | loss,
            "optimizer step": {"gradients in fp32": optimizer_step_bytes(sizes, job)},
        },
    )


def _different(sizes: Sizes, job: Job) -> list[tuple[LayerSettings, float]]:
    """The settings of all layers and turns, with what their recurrences save of a token, in bytes; each once."""
    saved = [0 if layer.recurrence is None else layer.recurrence.saved[job.itemsize] for layer in sizes.shape.layers]
    turns = [*job.turns, *job.taught]
    return list(dict.fromkeys((turn.at_layer(i), own) for turn in turns for i, own in enumerate(saved)))


def static_bytes(sizes: Sizes, job: Job) -> dict[str, int]:
    """Weights, gradients and optimizer states under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3)."""
    b, ranks, levers = job.itemsize, job.num_gpus, job.levers
    trained, whole = sizes.num_trained, weight_bytes(sizes, job)
    sharded = whole // ranks if job.stage == 3 else whole
    # With one rank ZeRO-3 computes on the shard itself.
    is_gathered = job.stage == 3 and (ranks > 1 or levers.offload_param)
    # Stage 1 reduces at the end of the step, and until then each rank has all gradients. Offload moves the shards to
    # the host; DeepSpeed's stages 2 and 3 do so as soon as a bucket is reduced.
    gradients = trained // ranks if job.stage > 1 else trained
    gradients = 0 if levers.offload_optimizer and job.stage > 1 else gradients
    # The gradient of a tied output layer waits until that of the embeddings is there, at the end of the backward pass.
    tied = sizes.vocabulary * sizes.hidden_size if sizes.is_tied and sizes.shape.output.is_trained else 0
    return {
        "weights": 0 if levers.offload_param else sharded,
        "scales of 4-bit weights": scale_bytes(sizes, job),
        "gathered weights": gathered_bytes(sizes, job, MAX_LIVE) if is_gathered else 0,
        "gradients": b * (gradients + tied + job.bucket),
        "optimizer states": 0 if levers.offload_optimizer else (FP32 + job.state_bytes) * trained // ranks,
    }


def optimizer_step_bytes(sizes: Sizes, job: Job) -> int:
    """Gradients in fp32: of all parameters of a rank at once, or under ZeRO-3 of a group of them."""
    if job.levers.offload_optimizer:
        return 0
    mine = sizes.num_trained // job.num_gpus
    return FP32 * (min(mine, SUB_GROUP) if job.stage == 3 else mine)


def checkpoint_bytes(sizes: Sizes, job: Job) -> int:
    """The inputs of all layers; from host memory that of the layer at hand, and of the one that is fetched meanwhile.

    With them the outputs of attention, if these are saved; those of the layer at hand are counted in `layer_bytes`.
    Without activation checkpointing, all that the layers but one save.
    """
    row, attention = job.num_tokens * sizes.hidden_size * job.itemsize, saved_attention_bytes(sizes, job)
    if not job.checkpointing:
        return (sizes.num_layers - 1) * max(
            sum(saved_bytes(sizes, job, *each).values()) for each in _different(sizes, job)
        )
    layers = 2 if job.levers.offload_checkpoints else sizes.num_layers
    return layers * row + (layers - 1) * attention


def saved_attention_bytes(sizes: Sizes, job: Job) -> int:
    """What `memory.save_attention` saves of a layer that has attention: output and log-sum-exp."""
    if not job.levers.save_attention:
        return 0
    # Under an exchange that merges them, those of window and history.
    parts = 2 if job.sp_size > 1 and EXCHANGES[job.exchange].merges_parts else 1
    return parts * job.num_tokens * attention_width(sizes.num_heads, sizes.head_dim, job.itemsize)


def _norm_saved(job: Job) -> int:
    """Bytes of an element that a norm, and the matrix behind it, save.

    Written out, the norm of transformers saves its input in fp32, the normalized input, and its output, which the
    matrices read. Liger's saves the input as it is, and the output.
    """
    return 2 * job.itemsize if job.fused else FP32 + 2 * job.itemsize


def saved_bytes(sizes: Sizes, job: Job, config: LayerSettings, of_recurrence: float = 0) -> dict[str, int]:
    """What the forward pass of a layer saves for its backward pass, beside the input of the layer.

    Args:
        of_recurrence: bytes that the recurrent module of the layer saves of a token.
    """
    n, b, c = job.num_tokens, job.itemsize, sizes.hidden_size
    width = sizes.num_heads * sizes.head_dim + sizes.num_kv_heads * sizes.head_dim
    norms = n * c * _norm_saved(job) * sizes.num_norms - (n * c * b if job.fused else 0)  # the first reads a checkpoint
    if sizes.has_head_norms:
        norms += n * width * (_norm_saved(job) - b)  # the rotary embedding saves no input
    tokens = min(n, job.tile_size) if job.levers.tiled_mlp else n
    # Gate, its activation, the other half and their product; Liger's kernel recomputes the activation.
    mlp = tokens * sizes.mlp_width * b * (3 if job.fused else 4)
    attention = attention_bytes(sizes, job, config) if config.has_keys else 0
    return {"norms": norms, "attention": attention + int(n * of_recurrence), "MLP": mlp}


def attention_bytes(sizes: Sizes, job: Job, config: LayerSettings) -> int:
    """Queries, keys and values, output and log-sum-exp of the attention of a layer, with the kept KV and its copies."""
    n, b = job.num_tokens, job.itemsize
    queries, kv = sizes.num_heads * sizes.head_dim * b, 2 * sizes.num_kv_heads * sizes.head_dim * b
    lse = FP32 * sizes.num_heads
    keys, shared = keys_of(job, config), job.sp_size > 1
    if not isinstance(config, LRSAConfig):
        return n * (2 * queries + lse) + (n + keys.halo) * kv
    if config.is_dense:
        # The output in another layout; on several ranks the queries, keys and values of a head group beside the own.
        return n * (3 * queries + kv + lse) + shared * n * (queries + kv)
    if shared and EXCHANGES[job.exchange].merges_parts:
        heads = max(1, sizes.num_kv_heads // job.sp_size) / sizes.num_kv_heads
        window = n * (2 * queries + lse) + (n + keys.halo) * kv
        return window + n * (2 * queries + lse) + int(keys.copied * kv * heads)
    # Of each token, where its gradient is read: the place of its copy, in int32, for each KV head.
    places = 0 if shared else n * FP32 * sizes.num_kv_heads
    received = shared * keys.kept * kv
    return n * (2 * queries + lse) + (keys.copied + keys.halo + n) * kv + places + received


def layer_bytes(sizes: Sizes, job: Job, config: LayerSettings, of_recurrence: float = 0) -> dict[str, int]:
    """The most that a layer holds in its backward pass: saved by its forward pass, and gradients.

    Going back, each of three steps may hold most. What a step has used is freed. The gradient of the output of the
    layer is there all along, for the residual connection, and measured peaks hold one row more: two in all.
    """
    n, b, c = job.num_tokens, job.itemsize, sizes.hidden_size
    row, saved = n * c * b, saved_bytes(sizes, job, config, of_recurrence)
    norms, attention, mlp = saved["norms"], saved["attention"], saved["MLP"]
    tiled = job.levers.tiled_mlp
    # The product of both halves: without Liger its two gradients and its own beside three saved tensors, with it the
    # gradient of the matrix behind it. Tiles: the gradients of all tiles, and both together when they are joined.
    width = mlp // (3 if job.fused else 4)
    in_mlp = (4 if job.fused else 6) * width + (2 * row if tiled else 0)
    # The adapters of the matrix behind the product give a gradient of it too.
    in_mlp += width * sizes.has_mlp_adapters
    # The norm before the MLP: gradients in fp32 of what it saves, and one product at a time; Liger's works in place.
    in_norm = row if job.fused else n * c * (3 * FP32 + b)
    # Attention: gradients of output, queries, keys and values, which kernels add up in fp32.
    queries, kv = sizes.num_heads * sizes.head_dim, 2 * sizes.num_kv_heads * sizes.head_dim
    keys = keys_of(job, config)
    in_attention = n * queries * (2 * b + FP32) + (n + keys.copied + keys.halo) * kv * (b + FP32)
    in_attention *= config.has_keys
    first = norms // max(1, sizes.num_norms)
    steps = {
        "MLP": {"norms": norms, "attention and kept KV": attention, "MLP": in_mlp},
        "norm": {"norms": norms + in_norm, "attention and kept KV": attention},
        "attention": {"norms": first, "attention and kept KV": attention + in_attention},
    }
    most = max(steps.values(), key=lambda parts: sum(parts.values()))
    return {f"one layer: {name}": size for name, size in most.items()} | {"one layer: gradients of its output": 2 * row}


def logits_bytes(sizes: Sizes, job: Job) -> int:
    """Log-probabilities, their gradient and that of the logits, in fp32, of the targets whose logits are held.

    With a teacher: its log-probabilities, both of the student, the divergence of each token, and three gradients.
    """
    return (7 if job.taught else 3) * FP32 * min(job.num_targets, job.chunk_size) * sizes.vocabulary


def host_memory(sizes: Sizes, job: Job) -> dict[str, int]:
    """Bytes on the fullest host, of all its ranks, beside the processes themselves (a few GB each).

    DeepSpeed's offload holds a shard in fp32, its two moments, its gradients in fp32, and a buffer of gradients in the
    dtype of the weights.
    """
    ranks, levers = min(job.num_gpus, job.gpus_per_node), job.levers
    b, shard = job.itemsize, sizes.num_trained // job.num_gpus
    layer = job.num_tokens * sizes.hidden_size * b + saved_attention_bytes(sizes, job)
    return {
        "optimizer states": ranks * (2 * FP32 + job.state_bytes + b) * shard * levers.offload_optimizer,
        "weights": ranks * weight_bytes(sizes, job) // job.num_gpus * levers.offload_param,
        "activation checkpoints": ranks * layer * sizes.num_layers * levers.offload_checkpoints,
    }
