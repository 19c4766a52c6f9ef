"""The one collective of sequence parallelism: an all-to-all of unequal parts, differentiable, and counted.

It has two halves, so that a rank can compute while the data travels: `start` launches the all-to-all, `finish` waits
for it. In the backward pass their roles swap: `finish` launches the all-to-all of the gradients, and `start` waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lrsa_ds.parallel.sequence.strategy import Strategy
from lrsa_ds.parallel.sequence.traffic import Traffic


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that share one sequence; `index` is this rank's index in the group."""

    process_group: dist.ProcessGroup
    size: int
    index: int
    strategy: Strategy  # which rank holds which tokens, and how a rank attends
    traffic: Traffic = field(default_factory=Traffic)


@dataclass
class Pending:
    """An all-to-all in flight, in the forward or the backward pass."""

    group: SequenceGroup
    cargo: str
    send_counts: list[int]
    recv_counts: list[int]
    work: dist.Work | None = None
    sent: torch.Tensor | None = None  # must outlive the launch
    received: torch.Tensor | None = None

    def launch(self, x: torch.Tensor, reverse: bool) -> torch.Tensor:
        sends, receives = self.send_counts, self.recv_counts
        if reverse:
            sends, receives = receives, sends
        self.sent = x.contiguous()
        self.received = x.new_empty(sum(receives))
        self.work = dist.all_to_all_single(
            self.received, self.sent, receives, sends, group=self.group.process_group, async_op=True
        )
        to_others = sum(sends) - sends[self.group.index]
        direction = "backward" if reverse else "forward"
        self.group.traffic.sent[self.cargo, direction] += to_others * x.element_size()
        return self.received

    def wait(self) -> torch.Tensor:
        work, received = self.work, self.received
        assert work is not None, "an all-to-all is waited for once, after its launch"
        assert received is not None
        work.wait()
        self.work = self.sent = self.received = None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pending):
        ctx.pending = pending
        return pending.launch(x, reverse=False)

    @staticmethod
    def backward(ctx, *_):
        # _Finish passes this on instead of the gradient, which was sent meanwhile.
        return ctx.pending.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, pending):
        ctx.pending = pending
        pending.wait()
        return received.view_as(received)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        ctx.pending.launch(gradient, reverse=True)
        return gradient, None


@dataclass(frozen=True)
class AllToAll:
    """A started all-to-all. `finish` returns one tensor from each rank of the group, in its order."""

    received: torch.Tensor
    pending: Pending
    recv_shapes: Sequence[tuple[int, ...]]

    def finish(self) -> list[torch.Tensor]:
        parts = self._flat().split(self.pending.recv_counts)
        return [part.view(shape) for part, shape in zip(parts, self.recv_shapes, strict=True)]

    def finish_stacked(self) -> torch.Tensor:
        """The result as one tensor [P, ...], without a copy, if all ranks send equal shapes."""
        return self._flat().view(len(self.recv_shapes), *self.recv_shapes[0])

    def _flat(self) -> torch.Tensor:
        return _Finish.apply(self.received, self.pending)


def start(
    group: SequenceGroup, cargo: str, parts: list[torch.Tensor], recv_shapes: Sequence[tuple[int, ...]]
) -> AllToAll:
    """Sends `parts[r]` to rank r of the group and receives a tensor of shape `recv_shapes[r]` from it.

    Args:
        cargo: the name under which bytes are counted; one of `traffic.CARGO`.
        parts: tensors of one dtype, of any shapes; their sizes are what the receivers expect.
    """
    flat = torch.cat([part.reshape(-1) for part in parts])
    return _start(group, cargo, flat, [part.numel() for part in parts], recv_shapes)


def start_even(group: SequenceGroup, cargo: str, x: torch.Tensor) -> AllToAll:
    """Sends x[r] of x [P, ...] to rank r and receives as much from it; no copy if `x` is contiguous."""
    return _start(group, cargo, x.reshape(-1), [x[0].numel()] * group.size, [tuple(x.shape[1:])] * group.size)


def start_to_all(group: SequenceGroup, cargo: str, x: torch.Tensor, recv_shapes: Sequence[tuple[int, ...]]) -> AllToAll:
    """Sends `x` to every rank; its gradient is the sum over the ranks, computed in fp32 and rounded once."""
    flat = x.reshape(1, -1).expand(group.size, -1).reshape(-1)
    return _start(group, cargo, flat, [x.numel()] * group.size, recv_shapes)


def _start(
    group: SequenceGroup, cargo: str, flat: torch.Tensor, send_counts: list[int], recv_shapes: Sequence[tuple[int, ...]]
) -> AllToAll:
    pending = Pending(group, cargo, send_counts, [torch.Size(shape).numel() for shape in recv_shapes])
    return AllToAll(_Start.apply(flat, pending), pending, recv_shapes)
