"""The negative log-likelihood of the target tokens.

Shapes: T target slots, C hidden size.
"""

from functools import reduce

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import require
from lrsa_ds.models.logits import logits_of
from lrsa_ds.objectives.objective import Batch, Objective, hidden_states
from lrsa_ds.settings.run import ObjectiveConfig


class TargetLoss(Objective):
    """`objective=target_loss`."""

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        require(
            config.objective == ObjectiveConfig(),
            "objective.weight, objective.temperature and objective.teacher have no effect under objective=target_loss: "
            "add objective=distill, or leave them out.",
        )

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        positions, labels = batch.slots()
        hidden = hidden_states(self.lm, batch, batch.lrsa_config)[positions]
        chunks = self.in_chunks(hidden, labels)
        total = reduce(torch.add, (checkpoint(self._loss, h, y, use_reentrant=False) for h, y in chunks))
        return total, total.new_empty(0).detach()

    def _loss(self, hidden_TC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits = logits_of(self.lm, hidden_TC)
        return cross_entropy(logits, labels_T, ignore_index=IGNORE, reduction="sum")
