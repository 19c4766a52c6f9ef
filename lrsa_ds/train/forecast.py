"""What a run will cost on any machine: the checks of a run, and the estimates of `lrsa_ds.costs`."""

from dataclasses import dataclass, replace

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.job import Job, job_of
from lrsa_ds.costs.plan import Estimate, Machine, alternatives, cheapest, estimate
from lrsa_ds.costs.sizes import Sizes, sizes_of
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.adapters import check_peft
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.models.structure import layers_of
from lrsa_ds.models.tiling import gated_mlps
from lrsa_ds.objectives import check_objective
from lrsa_ds.train.plan import check_model, check_sharing
from lrsa_ds.train.trainable import make_trainable


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
    """The costs of a run on a machine, and what else could be chosen.

    Raises:
        LRSAError: such a run is not possible, or its model cannot be counted.
    """
    job, sizes, config, structure = job_and_sizes(config, machine, itemsize, num_targets)
    offloads = config.optim.name != "adamw_8bit"
    jobs = alternatives(job, _sp_sizes(config, structure, machine.num_gpus), _can_tile(structure), offloads)
    others = [estimate(sizes, other, machine) for other in jobs]
    return Forecast(sizes, machine, estimate(sizes, job, machine), others)


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
