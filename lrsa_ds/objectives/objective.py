"""The interface of an objective: a batch, the loss computed on it, and what is logged.

Shapes: N tokens, T target slots, C hidden size, M logged sums.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lrsa_ds.attention import AttentionFunction, layer_attention
from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.layers import AnyConfig
from lrsa_ds.models.logits import logits_of
from lrsa_ds.models.parts import decoder_of
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.models.routers import Routers, total


@dataclass(frozen=True)
class Batch:
    """One row of packed documents, or this rank's shard of it.

    Args:
        input_ids, position_ids: [1, N], packed documents with positions that restart.
        labels: [1, N], the target token of each position, or IGNORE.
        document_lengths: of the complete row, even if this rank holds only a shard of it.
        lrsa_config: the attention of the pass.
        num_slots: at least the number of targets, and the same on every rank: under ZeRO-3 each use of the output
            layer is a collective, so every rank must use it equally often.
        attend: the attention function of the pass; a different one if this rank holds only a shard of the row.
        is_token: bool [N], False for padding; None if there is none.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    document_lengths: tuple[int, ...]
    lrsa_config: AnyConfig
    num_slots: int
    attend: AttentionFunction = layer_attention
    is_token: torch.Tensor | None = None

    def targets(self) -> torch.Tensor:
        """Positions of the targets in the shard, at most T."""
        return (self.labels[0] != IGNORE).nonzero()[:, 0]

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [T] and labels [T] of all slots; slots beyond the targets repeat position 0, with IGNORE."""
        targets = self.targets()
        positions = nn.functional.pad(targets, (0, self.num_slots - len(targets)))
        beyond = torch.arange(self.num_slots, device=positions.device) >= len(targets)
        return positions, self.labels[0][positions].masked_fill(beyond, IGNORE)


class Objective(nn.Module, ABC):
    """A causal language model together with its training objective: the module that DeepSpeed wraps.

    A subclass computes `losses`, and has a line in the table of `lrsa_ds.objectives`. Logits are computed at target
    positions only, `chunk_size` at a time, and recomputed in the backward pass.

    Attributes:
        lm: the model that is trained and exported.
        logged: names of the values logged beside the loss; each is divided by the number of targets of the step.
        retentions: of passes other than that under the settings of `attention`, so that they can be checked early.
        routers: those of a mixture of experts, whose balance is trained and logged beside any objective.
    """

    logged: tuple[str, ...] = ()
    retentions: tuple[float, ...] = ()
    routers: Routers | None = None

    def __init__(self, lm: PreTrainedModel, chunk_size: int):
        super().__init__()
        self.lm = lm
        self.chunk_size = chunk_size

    @classmethod
    @abstractmethod
    def check(cls, config: TrainConfig) -> None:
        """Raises LRSAError if `config.objective` is not possible with the rest of `config`."""

    @classmethod
    def of_run(cls, config: TrainConfig, lm: PreTrainedModel, load_start: Callable[[], PreTrainedModel]) -> "Objective":
        """The objective of a run around `lm`; `load_start` returns a copy of the model before any training."""
        return cls(lm, config.loss_chunk_size)

    @classmethod
    def describe(cls, config: TrainConfig) -> str:
        """A line about the objective for the start of a run; may be empty."""
        return ""

    @classmethod
    def num_frozen_copies(cls, config: TrainConfig) -> int:
        """Number of copies of the model that are held, and stored in checkpoints, beside the trained one."""
        return 0

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the targets of the batch, in fp32: the loss, and, detached, the values to log, [M]."""

    def forward(self, **fields) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Returns `losses` in training, followed by `Routing` if there are experts, and `statistics` in evaluation.

        Takes the fields of `Batch`.
        """
        batch = Batch(**fields)
        if not self.training:
            return self.statistics(batch)
        if self.routers is None:
            return self.losses(batch)
        with self.routers.watching(batch.is_token) as seen:
            losses = self.losses(batch)
        return *losses, *total(seen)

    def statistics(self, batch: Batch) -> torch.Tensor:
        """What is scored of each target, in order.

        Returns:
            [targets, 3]: its negative log-likelihood, whether the most likely token is the target (1.0 or 0.0), and
            the most likely token, which fp32 holds exactly.
        """
        positions, labels = batch.slots()
        hidden = hidden_states(self.lm, batch, batch.lrsa_config)[positions]
        return torch.cat([self._statistics(h, y) for h, y in self.in_chunks(hidden, labels)])[: len(batch.targets())]

    def _statistics(self, hidden_TC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits = logits_of(self.lm, hidden_TC)
        nll = cross_entropy(logits, labels_T, ignore_index=IGNORE, reduction="none")
        likeliest = logits.argmax(-1)
        return torch.stack([nll, (likeliest == labels_T).float(), likeliest.float()], dim=1)

    def in_chunks(self, *slots: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields tensors over the T slots, `chunk_size` slots at a time."""
        return zip(*(x.split(self.chunk_size) for x in slots), strict=True)


def objective_of(engine: Any) -> Objective:
    """The objective in DeepSpeed's engine."""
    return cast(Objective, engine.module)


def hidden_states(lm: PreTrainedModel, batch: Batch, lrsa_config: AnyConfig) -> torch.Tensor:
    """Output of the decoder of `lm` for the batch under `lrsa_config`, before the output layer: [N, C]."""
    decoder = decoder_of(lm)
    return decoder(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        document_lengths=batch.document_lengths,
        lrsa_config=lrsa_config,
        attend=batch.attend,
    ).last_hidden_state[0]
