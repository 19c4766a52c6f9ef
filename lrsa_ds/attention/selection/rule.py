"""Selection rules: a score for the tokens of each partition, and the inputs that it reads.

Shapes: B batch, G KV heads, P partitions, L lag size, D head dim, K kept per partition, R kept buffer slots, N tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.registry import SELECTION_RULES

# Inputs that a rule may declare. "reference" is the lag reference of the keys or values that it also declares.
READABLE = ("keys", "values", "reference", "value_weight")


@dataclass(frozen=True, eq=False)
class Partitions:
    """Partitions from which a rule selects tokens: their place in the given keys, and in their documents.

    Each is followed by its lag reference in these keys. `first` is the first start if the partitions are adjacent: then
    they can be read without a copy.
    """

    starts: torch.Tensor  # int64 [P]: position of the first token in the given keys
    numbers: torch.Tensor  # int64 [P]: number of the partition in its document, from 0 on
    first: int | None

    @classmethod
    def adjacent(cls, first: int, count: int, lag: int, device: torch.device, number: int = 0) -> "Partitions":
        """`count` partitions from position `first` on; the first of them is partition `number` of its document."""
        places = torch.arange(count, device=device)
        return cls(first + lag * places, number + places, first)

    @classmethod
    def joined(cls, parts: Sequence["Partitions"]) -> "Partitions":
        """The partitions of several documents, concatenated."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([p.starts for p in parts]), torch.cat([p.numbers for p in parts]), None)

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, x: torch.Tensor, lag: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Partitions and lag references of keys or values [B, G, N, D]: two [B, G, P, L, D]."""
        if self.first is not None:
            count = len(self) + 1
            parts = x[:, :, self.first : self.first + count * lag].unflatten(2, (count, lag))
            return parts[:, :, :-1], parts[:, :, 1:]
        tokens = self.starts[:, None] + torch.arange(2 * lag, device=x.device)
        pairs = x[:, :, tokens]
        return pairs[:, :, :, :lag], pairs[:, :, :, lag:]


class Candidates:
    """The tokens of some partitions, as a rule reads them; inputs that the rule did not declare cannot be read.

    Every rule can read `positions` and `layer`: they are the same in a training pass, a prefill and decoding, and on
    every rank.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, partitions: Partitions, config: LRSAConfig, layer: int):
        self.layer = layer
        self.num_heads, self.device = k.shape[1], k.device
        self._states, self._partitions, self._config = {"keys": k, "values": v}, partitions, config
        self._reads = SELECTION_RULES[config.selection].reads
        # Partitions that are not adjacent are copied together with their reference, so the copy is reused.
        self._last: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the tokens in their document, int64 [P, L]."""
        lag = self._config.lag_size
        starts = self._config.sink_size + lag * self._partitions.numbers
        return starts[:, None] + torch.arange(lag, device=self.device)

    @property
    def keys(self) -> torch.Tensor:
        """[B, G, P, L, D], with position encoding applied."""
        return self._read("keys", 0)

    @property
    def values(self) -> torch.Tensor:
        """[B, G, P, L, D]; D may differ from that of the keys."""
        return self._read("values", 0)

    @property
    def key_reference(self) -> torch.Tensor:
        """The keys of the lag reference of each partition, [B, G, P, L, D]."""
        return self._read("keys", 1)

    @property
    def value_reference(self) -> torch.Tensor:
        """The values of the lag reference of each partition, [B, G, P, L, D]."""
        return self._read("values", 1)

    @property
    def value_weight(self) -> float:
        self._check("value_weight")
        return self._config.value_weight

    def _read(self, what: str, which: int) -> torch.Tensor:
        self._check(what)
        if which:
            self._check("reference")
        if self._last is None or self._last[0] != what:
            self._last = (what, self._partitions.of(self._states[what], self._config.lag_size))
        return self._last[1][which]

    def _check(self, what: str) -> None:
        require(
            what in self._reads,
            f"the selection rule {self._config.selection} reads {what}, and declares {', '.join(self._reads)}: "
            "add it to its `reads`.",
        )


class FusedSelection(Protocol):
    """The fused GPU kernels of a rule."""

    def __call__(
        self,
        positions: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        partitions: Partitions,
        slots_P: torch.Tensor,
        config: LRSAConfig,
        layer: int,
        slot_of: torch.Tensor | None = None,
        copies: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Writes the kept positions of each partition to `positions`, int64 [B, G, R], from slot `slots_P[p]` on.

        Args:
            k, v: keys and values of one shape, [B, G, N, D], on a GPU.
            slot_of: int32 [B, G, N], optional: the slot of each kept token is written to it.
            copies: of keys and values, [B, G, C + N, D] each and contiguous, optional: the tokens of the partitions
                are copied to their places after the first C rows.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionRule:
    """How the tokens to keep of each partition are chosen.

    Args:
        score: from `Candidates` to fp32 [B, G, P, L], or to a shape that expands to it. The K tokens with the highest
            scores are kept; ties go to the lower position. Scores carry no gradient. None if nothing is kept.
        reads: the inputs of `score`, from `READABLE`; `positions` and `layer` need no declaration.
        fused: the same selection in fused GPU kernels. Without it the rule runs in PyTorch on a GPU.
        keeps_nothing: K is 0 at every retention below 1, and no token is scored.
    """

    score: Callable[[Candidates], torch.Tensor] | None = None
    reads: tuple[str, ...] = ()
    fused: FusedSelection | None = None
    keeps_nothing: bool = False

    def __post_init__(self):
        unknown = [what for what in self.reads if what not in READABLE]
        require(not unknown, f"a selection rule cannot read {', '.join(unknown)}: it reads {', '.join(READABLE)}.")
        require(
            (self.score is None) == self.keeps_nothing,
            "a selection rule has a score, or sets keeps_nothing=True: one of the two.",
        )


def register_selection(name: str, rule: SelectionRule) -> None:
    """Registers `rule` as `attention.selection=name`.

    Call it in every process that trains, evaluates or loads a model with the rule.

    Raises:
        LRSAError: the name is taken, or `rule` is not a `SelectionRule`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise LRSAError(f"{name!r} is not a name for a selection rule: give letters, digits and underscores.")
    if not isinstance(rule, SelectionRule):
        raise LRSAError(f"the selection rule {name} is a {type(rule).__name__}: give a lrsa_ds.SelectionRule.")
    SELECTION_RULES.add(name, rule)
