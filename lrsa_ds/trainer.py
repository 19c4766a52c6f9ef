"""The training loop: optimizer steps over packed sequences, with a loss that is exact to the token."""

import math
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from deepspeed import DeepSpeedEngine as Engine

from lrsa_ds.config import LRSAConfig, OptimConfig, TrainConfig, require
from lrsa_ds.data.packing import PackedSequence, collate, shard
from lrsa_ds.parallel.attention import attention_function
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.parallel.zero import gradient_scale


def cosine_schedule(optim: OptimConfig) -> Callable[[int], float]:
    """Share of the peak learning rate at step s (from 0): linear warm-up, then a cosine down to `min_lr_ratio`."""

    def factor(step: int) -> float:
        if step < optim.warmup_steps:
            return (step + 1) / optim.warmup_steps
        progress = (step - optim.warmup_steps) / max(1, optim.num_steps - optim.warmup_steps)
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return factor


def forward(engine: Engine, batch: PackedSequence, attention: LRSAConfig, num_slots: int, mesh: Mesh) -> torch.Tensor:
    """One pass of the model with its loss over this rank's shard of a row; see `TargetLoss.forward`."""
    return engine(
        input_ids=batch.input_ids[None].to(mesh.device, non_blocking=True),
        position_ids=batch.position_ids[None].to(mesh.device, non_blocking=True),
        labels=batch.labels[None].to(mesh.device, non_blocking=True),
        document_lengths=batch.document_lengths,
        lrsa_config=attention,
        num_slots=num_slots,
        attend=attention_function(mesh.sequence),
    )


class Trainer:
    """Runs `config.optim.num_steps` optimizer steps of `engine` over this rank's share of the data."""

    def __init__(self, config: TrainConfig, mesh: Mesh, engine: Engine, steps: Iterator[list[PackedSequence]]):
        self.config = config
        self.mesh = mesh
        self.engine = engine
        self.steps = steps
        self.scale = gradient_scale(config, mesh.world_size)
        self.num_layers = engine.module.lm.config.get_text_config().num_hidden_layers

    def fit(self, on_step: Callable[[dict], None]) -> None:
        """Trains, and calls `on_step` with the metrics of each step (the same on every rank)."""
        self.engine.train()
        self._traffic()  # what an evaluation sent before belongs to no step
        reset_peak_memory(self.mesh.device)
        for step in range(self.config.optim.num_steps):
            start = time.perf_counter()
            metrics = self.train_step(step, next(self.steps))
            seconds = time.perf_counter() - start
            on_step(metrics | {"tokens_per_second": metrics["num_tokens"] / seconds, "step_seconds": seconds})

    def train_step(self, step: int, sequences: list[PackedSequence]) -> dict:
        """One optimizer step: `grad_accum` micro-batches of `micro_batch` sequences. Returns its metrics."""
        mesh, size = self.mesh, self.config.optim.micro_batch
        rows = [collate(sequences[i : i + size], mesh.sp_size) for i in range(0, len(sequences), size)]
        batches = [shard(row, mesh.sp_size, mesh.sp_rank) for row in rows]
        counts = [float(b.num_target_tokens) for b in batches]
        num_tokens, num_targets = mesh.sum([sum(float(b.num_tokens) for b in batches), sum(counts)])
        slots = mesh.max(counts)
        require(num_targets > 0, f"step {step + 1} has no target token: look at the answers of the data.")
        attention = self.config.attention.at_step(step)
        local_loss = 0.0
        for batch, num_slots in zip(batches, slots, strict=True):
            loss = forward(self.engine, batch, attention, max(1, int(num_slots)), mesh) / num_targets
            local_loss = local_loss + loss.detach()
            self.engine.backward(loss * self.scale)
            self.engine.step()
        loss = mesh.sum([float(local_loss)])[0]
        require(math.isfinite(loss), f"the loss of step {step + 1} is {loss}: lower optim.lr, or look at the data.")
        return {
            "step": step + 1,
            "loss": loss,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "lr": self.config.optim.lr * cosine_schedule(self.config.optim)(step),
            "retention": attention.retention,
            "num_tokens": int(num_tokens),
            "num_target_tokens": int(num_targets),
            "peak_memory_gb": mesh.max([peak_memory_gb(mesh.device)])[0],
            **self._traffic(),
        }

    def _traffic(self) -> dict[str, float]:
        """Bytes that a rank sent in a layer since the last call, forward and backward, on average over the ranks."""
        if self.mesh.sequence is None:
            return {}
        counts = self.mesh.sequence.traffic.take(self.num_layers)
        totals = self.mesh.sum(list(counts.values()))
        return {name: total / self.mesh.world_size for name, total in zip(counts, totals, strict=True)}


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float:
    """On a GPU the most memory that tensors have held, on the CPU what the process holds now; in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
