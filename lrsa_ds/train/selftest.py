"""Compares training with and without sequence parallelism: two steps of one configuration, side by side."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.procedure import Procedure
from lrsa_ds.dtypes import dtype_name
from lrsa_ds.errors import require
from lrsa_ds.objectives import objective_of
from lrsa_ds.parallel.mesh import Mesh, start_mesh, stop_mesh
from lrsa_ds.process.signals import StopRequest
from lrsa_ds.settings.run import OptimConfig
from lrsa_ds.train.plan import Plan, prepare
from lrsa_ds.train.run import build_engine, build_trainer
from lrsa_ds.train.trainer import Engine

NUM_STEPS = 2
# Relative differences of losses and of gradients that rounding explains. In bf16 another order of summation may change
# which keys are kept if two scores are close: then the gradient of one weight differs by far more than the norm.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 3e-1)}


@dataclass(frozen=True)
class Measured:
    """Metrics of the steps, and gradients of the first step: for each parameter this rank's part, in fp32."""

    rows: list[dict]
    gradients: dict[str, torch.Tensor]


def selftest(config: TrainConfig, procedure: Procedure) -> bool:
    """Prints the comparison on rank 0. Returns, on every rank, whether rounding explains the differences.

    Raises:
        LRSAError: the configuration has no sequence parallelism, or a run would refuse it.
    """
    StopRequest()
    size = config.parallel.sp_size
    require(size > 1, "the self-test compares sequence parallelism with none: set parallel.sp_size to 2 or more.")
    config = replace(config, output_dir=None)
    plan = prepare(config, procedure)
    config = replace(config, memory=plan.config.memory, zero=plan.config.zero)  # as memory=auto has chosen
    mesh = start_mesh(size, exchange=config.parallel.exchange)
    # Equally many sequences in a step: with sequence parallelism there are `size` times fewer replicas.
    shared = _measure(_two_steps(config, size, config.optim.grad_accum * size), plan, mesh)
    alone = _measure(_two_steps(config, 1, config.optim.grad_accum), plan, replace(mesh, sequence=None))
    worst, name = _worst_gradient(shared.gradients, alone.gradients, mesh)
    passed = _differences(shared, alone, worst, plan.dtype)
    if mesh.is_main:
        print("\n".join(_table(shared, alone, worst, name, size)), flush=True)
        print(_verdict(passed, plan.dtype), flush=True)
    stop_mesh()
    return passed


def _two_steps(config: TrainConfig, sp_size: int, grad_accum: int) -> TrainConfig:
    optim: OptimConfig = replace(config.optim, num_steps=NUM_STEPS, warmup_steps=0, grad_accum=grad_accum)
    return replace(config, optim=optim, parallel=replace(config.parallel, sp_size=sp_size))


def _measure(config: TrainConfig, plan: Plan, mesh: Mesh) -> Measured:
    torch.manual_seed(config.seed)
    engine = build_engine(config, plan, mesh)
    # Under ZeRO-3 a rank holds a part of every gradient; both runs shard alike, so the parts can be compared.
    sharded = config.zero.stage == 3
    read = deepspeed.utils.safe_get_local_grad if sharded else deepspeed.utils.safe_get_full_grad
    gradients, rows = keep_gradients(engine, read), []
    build_trainer(config, plan, mesh, engine).fit(lambda row, position: rows.append(row))
    engine.destroy()
    del engine
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return Measured(rows, gradients)


def keep_gradients(engine: Engine, read: Callable[[torch.nn.Parameter], Any]) -> dict[str, torch.Tensor]:
    """A dict, on the CPU, that receives `read(parameter)` of each trained parameter just before the first step."""
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def keep_and_step(lr_kwargs: dict | None = None) -> None:
        if engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in objective_of(engine).lm.named_parameters():
                if parameter.requires_grad:
                    gradients[name] = read(parameter).detach().float().cpu().clone()
        take_step(lr_kwargs)

    engine.step = keep_and_step
    return gradients


def _worst_gradient(actual: dict, expected: dict, mesh: Mesh) -> tuple[float, str]:
    """The largest relative error of a complete gradient (RMS of the difference / RMS), and its parameter's name."""
    names = list(expected)
    squares = [[(actual[n] - expected[n]).square().sum().item(), expected[n].square().sum().item()] for n in names]
    totals = torch.tensor(mesh.sum([x for pair in squares for x in pair]), dtype=torch.float64).view(-1, 2).sqrt()
    # A gradient that is zero up to rounding (a bias of the keys has no effect) is compared with the largest one.
    scale = totals[:, 1].clamp(min=1e-6 * totals[:, 1].max().item())
    errors = totals[:, 0] / scale
    place = int(errors.argmax())
    return errors[place].item(), names[place]


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b else abs(a)


def _differences(shared: Measured, alone: Measured, worst: float, dtype: torch.dtype) -> bool:
    of_loss, of_gradient = TOLERANCES[dtype]
    pairs = list(zip(shared.rows, alone.rows, strict=True))
    counted = all(a[key] == b[key] for a, b in pairs for key in ("num_tokens", "num_target_tokens"))
    losses = max(_relative(a["loss"], b["loss"]) for a, b in pairs)
    norm = _relative(shared.rows[0]["grad_norm"], alone.rows[0]["grad_norm"])
    return counted and losses <= of_loss and max(norm, worst) <= of_gradient


def _table(shared: Measured, alone: Measured, worst: float, name: str, size: int) -> list[str]:
    lines = [f"{'':<24}{'sp_size=1':>14}{f'sp_size={size}':>14}{'difference':>14}"]
    for step in range(NUM_STEPS):
        for key, title in (("loss", "loss"), ("grad_norm", "gradient norm")):
            a, b = alone.rows[step][key], shared.rows[step][key]
            lines.append(f"{f'{title}, step {step + 1}':<24}{a:>14.6f}{b:>14.6f}{_relative(b, a):>14.1e}")
    for key, title in (("num_tokens", "tokens"), ("num_target_tokens", "target tokens")):
        a, b = (sum(row[key] for row in measured.rows) for measured in (alone, shared))
        lines.append(f"{title:<24}{a:>14,}{b:>14,}{b - a:>14}")
    lines.append(f"{'optimizer steps':<24}{len(alone.rows):>14}{len(shared.rows):>14}")
    return [*lines, f"{'worst gradient, step 1':<24}{'':>28}{worst:>14.1e}  {name}"]


def _verdict(passed: bool, dtype: torch.dtype) -> str:
    of_loss, of_gradient = TOLERANCES[dtype]
    limits = f"{of_loss:.0e} of the losses and {of_gradient:.0e} of the gradients in {dtype_name(dtype)}"
    if passed:
        return f"passed: the differences are within {limits}"
    return f"FAILED: the differences are not within {limits}"
