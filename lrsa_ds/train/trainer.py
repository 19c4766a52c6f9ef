"""The training loop: optimizer steps over packed sequences, with a loss that is exact to the token."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine as Engine

from lrsa_ds.attention import AttentionFunction
from lrsa_ds.compression import Compression
from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import PackedSequence, collate, padding_sequence, shard
from lrsa_ds.data.stream import StepData
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layers import AnyConfig, in_model
from lrsa_ds.models.structure import layers_of
from lrsa_ds.objectives import objective_of
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.parallel.sequence.attention import attention_function
from lrsa_ds.parallel.zero import gradient_scale
from lrsa_ds.settings.run import OptimConfig
from lrsa_ds.train.balance import Balance
from lrsa_ds.train.throughput import PhaseClock, Throughput, host_memory_gb, num_hosts

# Maximum number of left-out rows to print in one step; the others are counted.
MOST_REASONS = 10
PHASES = ("forward", "backward", "optimizer")


def cosine_schedule(optim: OptimConfig) -> Callable[[int], float]:
    """Share of the peak learning rate at step s (from 0): linear warm-up, then a cosine down to `min_lr_ratio`."""

    def factor(step: int) -> float:
        if step < optim.warmup_steps:
            return (step + 1) / optim.warmup_steps
        progress = (step - optim.warmup_steps) / max(1, optim.num_steps - optim.warmup_steps)
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return factor


def held_of(row: PackedSequence, mesh: Mesh) -> PackedSequence:
    """This rank's shard of a row."""
    return shard(row, mesh.local_tokens(len(row.labels)), is_first=mesh.sp_rank == 0)


def forward(
    engine: Engine,
    batch: PackedSequence,
    attention: AnyConfig,
    num_slots: int,
    mesh: Mesh,
    attend: AttentionFunction | None = None,
) -> Any:
    """One pass of the objective over this rank's shard of a row; returns the result of `Objective.forward`.

    Args:
        attend: replaces the attention function of `mesh`.
    """
    is_token = batch.is_token()
    return engine(
        input_ids=batch.input_ids[None].to(mesh.device, non_blocking=True),
        position_ids=batch.position_ids[None].to(mesh.device, non_blocking=True),
        labels=batch.labels[None].to(mesh.device, non_blocking=True),
        document_lengths=batch.document_lengths,
        lrsa_config=attention,
        num_slots=num_slots,
        attend=attend or attention_function(mesh.sequence),
        is_token=torch.cat([is_token[part] for part in mesh.local_tokens(len(is_token))]).to(mesh.device),
    )


class Trainer:
    """Runs optimizer steps of `engine` over this rank's share of the data, up to `config.optim.num_steps`.

    Args:
        steps: the data of the steps in order, starting after `first_step`.
        first_step: number of steps completed earlier.
        doing: called with a description of what this rank begins to do.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        engine: Engine,
        steps: Iterator[StepData],
        first_step: int = 0,
        doing: Callable[[str], None] = lambda what: None,
    ):
        self.config = config
        self.mesh = mesh
        self.engine = engine
        self.steps = steps
        self.first_step = first_step
        self.doing = doing
        self.scale = gradient_scale(config, mesh.world_size)
        self.layers = layers_of(objective_of(engine).lm.config)
        self.attention = config.attention.resolved(self.layers)
        resolved = replace(config, attention=self.attention)
        self.throughput = Throughput(resolved, objective_of(engine), mesh.device_name, mesh.world_size)
        self.clock = PhaseClock(mesh.device)

    def fit(
        self, on_step: Callable[[dict, dict], None], before_step: Callable[[int], None] = lambda step: None
    ) -> None:
        """Trains, and calls `on_step` after each step with its metrics and the position of the data after it.

        Both are the same on every rank. `before_step` is called with the number of the next step, counted from 1.
        """
        self.engine.train()
        reset_peak_memory(self.mesh.device)
        for step in range(self.first_step, self.config.optim.num_steps):
            before_step(step + 1)
            start = time.perf_counter()
            self.doing(f"step {step + 1}: reading data")
            data = next(self.steps)
            data_seconds = time.perf_counter() - start
            self.doing(f"step {step + 1}: computing")
            metrics = self.train_step(step, data.sequences) | self._changed_rows(data)
            seconds = time.perf_counter() - start
            metrics |= {"tokens_per_second": metrics["num_tokens"] / seconds, "step_seconds": seconds}
            metrics |= {"data_seconds": data_seconds, **self.throughput.rates(seconds)}
            on_step(metrics, data.position)

    def train_step(self, step: int, sequences: list[PackedSequence]) -> dict:
        """One optimizer step: `grad_accum` micro-batches of `micro_batch` sequences. Returns its metrics."""
        mesh, size = self.mesh, self.config.optim.micro_batch
        if mesh.sequence is not None:
            mesh.sequence.traffic.clear()  # bytes of an evaluation belong to no step
        rows = [collate(sequences[i : i + size], mesh.row_multiple) for i in range(0, len(sequences), size)]
        batches = [held_of(row, mesh) for row in rows]
        counts = [float(b.num_target_tokens) for b in batches]
        arrived = time.perf_counter()
        num_tokens, num_targets = mesh.sum([sum(float(b.num_tokens) for b in batches), sum(counts)])
        waited = time.perf_counter() - arrived
        slots = mesh.max(counts)
        require(num_targets > 0, f"step {step + 1} has no target token: check the answers of the data.")
        attention = in_model(self.attention.at_step(step), self.layers)
        compressed = self._compression(rows, attention)
        flops = self._local_flops(rows, slots, attention)
        self.clock.start()
        local_loss: float | torch.Tensor = 0.0
        local_logged: Any = 0.0  # a tensor after the first pass
        num_skipped = 0
        balance = Balance(objective_of(self.engine).routers, mesh, len(batches))
        for batch, num_slots in zip(batches, slots, strict=True):
            total, logged, *routing = forward(self.engine, batch, attention, max(1, int(num_slots)), mesh)
            loss = total / num_targets
            bad = self._replicas_with_bad_loss(loss)
            if bad:
                self._report_bad_loss(step, batch, bad)
                num_skipped += len(bad)
                # A pass is a collective: the other ranks repeat theirs, and those with a bad loss process padding.
                if mesh.dp_rank in bad:
                    padding = padding_sequence(sum(batch.document_lengths), pad_id=0)
                    batch = held_of(padding, mesh)
                total, logged, *routing = forward(self.engine, batch, attention, max(1, int(num_slots)), mesh)
                loss = total / num_targets
            local_loss = local_loss + loss.detach()
            local_logged = local_logged + logged / num_targets
            loss = loss + balance.loss(batch, *routing)
            self.clock.lap("forward")
            self.engine.backward(loss * self.scale)
            self.clock.lap("backward")
            self.engine.step()
            self.clock.lap("optimizer")
        mean_loss, host_memory, *flops = mesh.sum([float(local_loss), host_memory_gb(), *flops])
        self.throughput.begin(*flops)
        return {
            "step": step + 1,
            "loss": mean_loss,
            "grad_norm": float(cast(float, self.engine.get_global_grad_norm())),
            "lr": self.config.optim.lr * cosine_schedule(self.config.optim)(step),
            "retention": attention.retention,
            "num_tokens": int(num_tokens),
            "num_target_tokens": int(num_targets),
            **compressed,
            **self._memory_and_times(waited),
            "host_memory_gb": host_memory / num_hosts(mesh.world_size),
            **self._logged(local_logged),
            **balance.metrics(),
            **({"num_skipped_rows": num_skipped} if num_skipped else {}),
            **self._traffic(),
        }

    def _local_flops(self, rows: list[PackedSequence], slots: list[float], attention: AnyConfig) -> list[float]:
        """Operations of the step for this rank's rows, including padding: executed, and with dense attention."""
        mesh, size = self.mesh, self.mesh.sp_size
        mine = zip(rows, slots, strict=True) if mesh.sp_rank == 0 else []  # one rank counts for all that share a row
        counts = [
            self.throughput.count(row.document_lengths, size * max(1, int(num_slots)), attention)
            for row, num_slots in mine
        ]
        return [float(sum(of_rows)) for of_rows in zip((0, 0), *counts, strict=True)]

    def _memory_and_times(self, waited: float) -> dict[str, float]:
        """Memory of the fullest GPU, and seconds by phase, on the slowest rank for each."""
        mesh = self.mesh
        names = ("peak_memory_gb", "wait_seconds", *(f"{phase}_seconds" for phase in PHASES))
        most = mesh.max([peak_memory_gb(mesh.device), waited, *self.clock.seconds(PHASES)])
        return dict(zip(names, most, strict=True))

    def _compression(self, rows: list[PackedSequence], attention: AnyConfig) -> dict[str, float]:
        """How many times smaller the caches of the step's documents are, and tokens in documents too short for LRSA."""
        if attention.is_dense:
            return {}
        mine = rows if self.mesh.sp_rank == 0 else []  # one rank counts for all that share a row
        lengths = [n for row in mine for n, i in zip(row.document_lengths, row.example_indices, strict=True) if i >= 0]
        total = Compression(*self.mesh.sum(list(astuple(Compression.of(lengths, attention)))))
        return {"cache_factor": total.factor, "num_short_tokens": int(total.num_short)}

    def _changed_rows(self, data: StepData) -> dict:
        """Counts rows that this step left out or cut, and prints the reasons of those that cannot be used."""
        reasons = [row.reason for row in data.left_out if not row.is_too_long]
        if self.mesh.is_main:
            for reason in reasons[:MOST_REASONS]:
                print(f"left out: {reason}", flush=True)
            if len(reasons) > MOST_REASONS:
                print(f"left out: {len(reasons) - MOST_REASONS} more rows", flush=True)
        counts = {
            "num_left_out_rows": len(data.left_out),
            "num_cut_tokens": data.num_cut_tokens,
            "num_lost_answers": data.num_lost_answers,
        }
        return {name: count for name, count in counts.items() if count}

    def _logged(self, local_sums: torch.Tensor) -> dict[str, float]:
        """What the objective logs beside the loss, from this rank's sums over the targets of the step."""
        names = objective_of(self.engine).logged
        return dict(zip(names, self.mesh.sum(local_sums.tolist()), strict=True)) if names else {}

    def _replicas_with_bad_loss(self, loss: torch.Tensor) -> list[int]:
        """Replicas whose loss is not finite; the same on every rank."""
        flags = [0.0] * self.mesh.dp_size
        flags[self.mesh.dp_rank] = float(not math.isfinite(loss.item()))
        return [replica for replica, flag in enumerate(self.mesh.max(flags)) if flag]

    def _report_bad_loss(self, step: int, batch: PackedSequence, bad: list[int]) -> None:
        """Prints the samples with a bad loss if they are to be skipped; otherwise raises an error, on every rank."""
        mesh = self.mesh
        mine = [i for i in batch.example_indices if i >= 0] if mesh.dp_rank in bad and mesh.sp_rank == 0 else []
        everyone: list[list[int]] = [[] for _ in range(mesh.world_size)]
        dist.all_gather_object(everyone, mine)
        samples = ", ".join(str(i) for indices in everyone for i in indices)
        what = f"the loss of step {step + 1} is not finite at sample{'s' * (samples.count(',') > 0)} {samples}"
        if self.config.optim.on_nan == "skip":
            if mesh.is_main:
                print(f"{what}: left out (optim.on_nan=skip)", flush=True)
            return
        raise LRSAError(f"{what}: lower optim.lr, check the data, or set optim.on_nan=skip to leave them out.")

    def _traffic(self) -> dict[str, float]:
        """Bytes that a rank sent for a layer in this step, forward and backward; the mean over the ranks."""
        if self.mesh.sequence is None:
            return {}
        counts = self.mesh.sequence.traffic.take(len(self.layers))
        totals = self.mesh.sum(list(counts.values()))
        return {name: total / self.mesh.world_size for name, total in zip(counts, totals, strict=True)}


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of tensors on a GPU, present memory of the process on the CPU; in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return host_memory_gb()
