"""Distillation: under LRSA the model learns the dense predictions of itself, or of the model at the start.

With w = `objective.weight` and t = `objective.temperature`, over all target tokens,

    loss = (1 - w) * negative log-likelihood + w * t^2 * KL(softmax(teacher / t) || softmax(student / t))

where t^2 keeps the size of the gradients independent of t (Hinton et al. 2015, arXiv 1503.02531, section 2). The
teacher is a pass of dense attention over the same tokens, without gradients: of the present model (`teacher: self`), or
of its start weights (`teacher: start`), which are a frozen copy, or under LoRA the model without its adapters.

Shapes: T target slots, C hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import require
from lrsa_ds.layers import AnyConfig
from lrsa_ds.models.adapters import adapters_disabled
from lrsa_ds.models.logits import logits_of
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.objectives.objective import Batch, Objective, hidden_states
from lrsa_ds.settings.run import ObjectiveConfig


class Distill(Objective):
    """`objective=distill`.

    Args:
        dense: attention settings of the teacher.
        teacher: a frozen copy of the model; None: the teacher is `lm` itself.
        without_adapters: whether the teacher is `lm` without its adapters.
    """

    logged = ("target_loss", "divergence")
    retentions = (1.0,)

    def __init__(
        self,
        lm: PreTrainedModel,
        chunk_size: int,
        settings: ObjectiveConfig,
        dense: AnyConfig,
        teacher: PreTrainedModel | None = None,
        without_adapters: bool = False,
    ):
        super().__init__(lm, chunk_size)
        self.weight, self.temperature, self.dense = settings.weight, settings.temperature, dense
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.without_adapters = without_adapters

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        attention = config.attention
        is_dense = all(settings.is_dense for settings in attention.turns)
        require(
            config.objective.teacher == "start" or not is_dense,
            "objective.teacher=self under dense attention is the student itself, from which nothing can be learnt: use "
            "attention=lrsa or objective.teacher=start.",
        )

    @classmethod
    def of_run(cls, config: TrainConfig, lm: PreTrainedModel, load_start: Callable[[], PreTrainedModel]) -> "Distill":
        teacher = load_start() if cls.num_frozen_copies(config) else None
        without_adapters = config.objective.teacher == "start" and teacher is None
        dense = config.attention.with_retention(1.0)
        return cls(lm, config.loss_chunk_size, config.objective, dense, teacher, without_adapters)

    @classmethod
    def describe(cls, config: TrainConfig) -> str:
        settings = config.objective
        teacher = {"self": "the model itself", "start": "the start weights"}[settings.teacher]
        return (
            f"objective: distill from the dense pass of {teacher}, weight {settings.weight:g}, temperature "
            f"{settings.temperature:g}"
        )

    @classmethod
    def num_frozen_copies(cls, config: TrainConfig) -> int:
        return int(config.objective.teacher == "start" and config.model.lora.rank == 0)

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        positions, labels = batch.slots()
        with self._teacher() as teacher:
            taught = hidden_states(teacher, batch, self.dense)[positions]
        hidden = hidden_states(self.lm, batch, batch.lrsa_config)[positions]
        chunks = self.in_chunks(hidden, taught, labels)
        sums = reduce(torch.add, (checkpoint(self._sums, h, t, y, use_reentrant=False) for h, t, y in chunks))
        nll, divergence = sums
        total = (1 - self.weight) * nll + self.weight * self.temperature**2 * divergence
        return total, sums.detach()

    def _sums(self, hidden_TC: torch.Tensor, taught_TC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """[2]: the negative log-likelihood of the targets, and the divergence from the teacher at these tokens."""
        with self._teacher() as teacher:
            expected = log_softmax(logits_of(teacher, taught_TC) / self.temperature, dim=-1)
        logits = logits_of(self.lm, hidden_TC)
        nll = cross_entropy(logits, labels_T, ignore_index=IGNORE, reduction="sum")
        predicted = log_softmax(logits / self.temperature, dim=-1)
        divergence_T = kl_div(predicted, expected, reduction="none", log_target=True).sum(dim=-1)
        return torch.stack([nll, divergence_T.masked_fill(labels_T == IGNORE, 0.0).sum()])

    @contextmanager
    def _teacher(self) -> Iterator[PreTrainedModel]:
        """The model of the teacher, for passes without gradients."""
        with torch.no_grad(), adapters_disabled(self.lm) if self.without_adapters else nullcontext():
            yield self.lm if self.teacher is None else self.teacher
