"""What a run will cost on any machine: the checks of a run, and the estimates of `lrsa_ds.costs`."""

from dataclasses import dataclass, replace

import psutil
import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.gpus import GPU, gpu_of_device
from lrsa_ds.costs.job import Job, job_of, with_levers
from lrsa_ds.costs.plan import NETWORK_GB_S, Estimate, Machine, alternatives, cheapest
from lrsa_ds.costs.report import no_fit_sentence
from lrsa_ds.costs.sizes import Sizes, sizes_of
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.models.adapters import check_peft
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.models.structure import layers_of
from lrsa_ds.models.tiling import gated_mlps
from lrsa_ds.objectives import check_objective
from lrsa_ds.parallel.mesh import local_rank, world_size
from lrsa_ds.process.launcher import ranks_of_host
from lrsa_ds.train.checks import check_model, check_sharing
from lrsa_ds.train.trainable import make_trainable

# Of a host's memory, that the system, the processes themselves and their data take.
HOST_SHARE_IN_USE = 0.1


@dataclass(frozen=True)
class Forecast:
    """The estimate of a run as it is set, those of other SP sizes and levers, and the cheapest of all that fit."""

    sizes: Sizes
    machine: Machine
    chosen: Estimate
    others: list[Estimate]

    @property
    def best(self) -> Estimate | None:
        return cheapest(self.others, self.chosen)


def job_and_sizes(
    config: TrainConfig, machine: Machine, itemsize: int, num_targets: int | None = None
) -> tuple[Job, Sizes, TrainConfig, PreTrainedModel]:
    """What decides the costs of a run on a machine; its configuration with every layer, and the model on meta.

    Raises:
        LRSAError: such a run is not possible, or its model cannot be counted.
    """
    check_peft(config.model.lora)
    config, structure = check_model(config, machine.num_gpus)
    objective = check_objective(config)
    make_trainable(structure, config)
    sizes = sizes_of(structure)
    num_frozen = sum(p.numel() for p in structure.parameters()) * objective.num_frozen_copies(config)
    job = job_of(
        config,
        machine.num_gpus,
        itemsize,
        num_frozen,
        objective.retentions,
        num_targets,
        machine.gpus_per_node,
        layers_of(structure.config),
    )
    return job, sizes, config, structure


def forecast(config: TrainConfig, machine: Machine, itemsize: int, num_targets: int | None = None) -> Forecast:
    """The costs of a run on a machine, and what else could be chosen; by `memory.auto` the levers are chosen already.

    Raises:
        LRSAError: such a run is not possible, or its model cannot be counted.
    """
    job, sizes, config, structure = job_and_sizes(config, machine, itemsize, num_targets)
    offloads = config.optim.name != "adamw_8bit"
    jobs = alternatives(job, _sp_sizes(config, structure, machine.num_gpus), _can_tile(structure), offloads)
    others, chosen = [Estimate(sizes, other, machine) for other in jobs], Estimate(sizes, job, machine)
    if config.memory.auto:
        alike = [e for e in others if e.job.sp_size == job.sp_size and e.job.levers.include(job.levers)]
        chosen = cheapest(alike, chosen) or chosen
    return Forecast(sizes, machine, chosen, others)


def choose_levers(config: TrainConfig, machine: Machine, itemsize: int) -> TrainConfig:
    """The configuration with the cheapest levers that fit, at least those that it has on.

    Raises:
        LRSAError: none fit; the sentence says what would.
    """
    found = forecast(config, machine, itemsize)
    job = found.chosen.job
    if found.chosen.fits:
        return with_levers(config, job.levers)
    if found.best is None:
        raise LRSAError(f"memory.auto=true: {no_fit_sentence(found.others, job, machine)}")
    typed = " ".join([f"parallel.sp_size={found.best.job.sp_size}", *found.best.job.levers.overrides()])
    raise LRSAError(
        f"memory.auto=true finds no levers by which seq_len={job.seq_len} fits on {machine} with parallel.sp_size="
        f"{job.sp_size}: set {typed}."
    )


def machine_here(config: TrainConfig) -> Machine:
    """The GPUs of the run, all like that of this rank, and their hosts, all like this one.

    Raises:
        LRSAError: there is no GPU.
    """
    require(
        torch.cuda.is_available(),
        "memory.auto=true chooses by the memory of a GPU, and there is none: choose memory=none or memory=long.",
    )
    properties = torch.cuda.get_device_properties(local_rank())
    known = gpu_of_device(properties.name) or GPU(memory_gb=0)
    peak = config.log.peak_tflops or known.peak_tflops
    gpu = replace(known, memory_gb=properties.total_memory / 1e9, peak_tflops=peak)
    host = psutil.virtual_memory().total / 1e9 * (1 - HOST_SHARE_IN_USE)
    count = world_size()
    return Machine(properties.name, gpu, count, ranks_of_host(otherwise=count), NETWORK_GB_S, host)


def _can_tile(structure: PreTrainedModel) -> bool:
    try:
        gated_mlps(structure)
    except LRSAError:
        return False
    return True


def _sp_sizes(config: TrainConfig, structure: PreTrainedModel, num_gpus: int) -> list[int]:
    """Every SP size by which the sequences of the run could be shared."""
    return [size for size in range(1, num_gpus + 1) if num_gpus % size == 0 and _can_share(config, structure, size)]


def _can_share(config: TrainConfig, structure: PreTrainedModel, size: int) -> bool:
    shared = replace(config, parallel=replace(config.parallel, sp_size=size))
    try:
        check_sharing(shared, structure, check_objective(config).retentions, size)
    except LRSAError:
        return False
    return True
