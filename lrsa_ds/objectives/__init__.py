"""Training objectives: one class each, chosen by `objective`."""

from collections.abc import Callable

from lrsa_ds.config import TrainConfig
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.models.routers import Routers, router_coefficient
from lrsa_ds.objectives.distill import Distill
from lrsa_ds.objectives.objective import Batch, Objective, objective_of
from lrsa_ds.objectives.target_loss import TargetLoss
from lrsa_ds.registry import Registry

__all__ = ["OBJECTIVES", "Batch", "Objective", "TargetLoss", "check_objective", "make_objective", "objective_of"]

OBJECTIVES: Registry[type[Objective]] = Registry("objective.kind")
OBJECTIVES.add("target_loss", TargetLoss)
OBJECTIVES.add("distill", Distill)


def check_objective(config: TrainConfig) -> type[Objective]:
    """The class of the objective of a run.

    Raises:
        LRSAError: there is no such objective, or its settings are not supported.
    """
    objective = OBJECTIVES[config.objective.kind]
    objective.check(config)
    return objective


def make_objective(config: TrainConfig, lm: PreTrainedModel, load_start: Callable[[], PreTrainedModel]) -> Objective:
    """The objective around `lm`; `load_start` returns a copy of the model before any training."""
    objective = check_objective(config).of_run(config, lm, load_start)
    objective.routers = Routers.of(lm, router_coefficient(config.model, lm))
    return objective
