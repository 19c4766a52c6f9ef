"""Attention that runs once although its layer is recomputed: selective activation checkpointing.

Under activation checkpointing a layer runs again in the backward pass, and its attention is the part that grows with
the square of the length. `attend_once` saves what a kernel puts out in the forward pass, output and log-sum-exp, and
returns it in the recomputation instead of running the kernel. The queries, keys and values that the backward pass of
the kernel needs are recomputed with the rest of the layer.

torch's own selective checkpointing chooses by operators of its dispatcher. The kernels here are none: FlexAttention is
compiled, and flash-attn-4 is an autograd function. So this goes by what a kernel saves, whatever it is.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

# Stores tensors of the forward pass, and returns a function that brings them back.
Put = Callable[[Sequence[torch.Tensor]], Callable[[], Sequence[torch.Tensor]]]


def put_nowhere(tensors: Sequence[torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]]:
    """Leaves the tensors where they are."""
    return lambda: tensors


class _Now(threading.local):
    """The checkpointed layer that runs in this thread; the backward pass has threads of its own."""

    layer: "CheckpointedLayer | None" = None
    is_recomputing = False


_now = _Now()


def is_recomputing() -> bool:
    """Whether a checkpointed layer runs again in the backward pass."""
    return _now.is_recomputing


def checkpoint_contexts(put: Put | None = None) -> tuple["_Within", "_Within"]:
    """For one pass of a layer, the contexts of its forward pass and of its recomputation: torch's `context_fn`.

    Args:
        put: where the outputs of its attention are stored; None: attention is recomputed.
    """
    layer = CheckpointedLayer(put)
    return _Within(layer, is_recomputing=False), _Within(layer, is_recomputing=True)


class CheckpointedLayer:
    """The outputs of the attention of one pass of a layer, call by call."""

    def __init__(self, put: Put | None):
        self.put = put
        self.calls: list[_Outputs] = []
        self.next_call = 0


class _Within:
    """A context that may be entered again: each backward pass through a layer recomputes it."""

    def __init__(self, layer: CheckpointedLayer, is_recomputing: bool):
        self._layer, self._is_recomputing = layer, is_recomputing
        self._outside: list[tuple[CheckpointedLayer | None, bool]] = []

    def __enter__(self) -> None:
        self._outside.append((_now.layer, _now.is_recomputing))
        _now.layer, _now.is_recomputing = self._layer, self._is_recomputing
        self._layer.next_call = 0

    def __exit__(self, *_: object) -> None:
        _now.layer, _now.is_recomputing = self._outside.pop()


def attend_once(attend: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """`attend(*inputs)`, or in the recomputation of a layer what the same call has returned before.

    Args:
        attend: returns a tensor or a tuple of tensors, and gives gradients to no other tensors than `inputs`.
    """
    layer = _now.layer
    if layer is None or layer.put is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return attend(*inputs)
    # The checkpoint around the layer saves the inputs here, which its recomputation fills in again; it may end here.
    saver = _Inputs.apply(*inputs)
    if _now.is_recomputing:
        outputs = layer.calls[layer.next_call]
        layer.next_call += 1
        return outputs.again()
    recomputed, slots = _Recomputed(saver), []

    def pack(x: torch.Tensor) -> _Slot:
        slots.append(_Slot(x))
        return slots[-1]

    # Autograd calls the hooks, and not those of the checkpoint, for all that the kernel saves.
    with saved_tensors_hooks(pack, lambda slot: slot.get()):
        result = attend(*inputs)
    returned = [result] if isinstance(result, torch.Tensor) else list(result)
    also = [slot.tensor for slot in slots if _is_own(slot.tensor, [*inputs, *returned])]
    outputs = _Outputs([*returned, *also], len(returned), isinstance(result, torch.Tensor), layer.put)
    layer.calls.append(outputs)
    for slot in slots:
        slot.settle(inputs, recomputed, [*returned, *also], outputs)
    return result


class _Inputs(torch.autograd.Function):
    """Saves its inputs; its own gradient is never asked for."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx, *gradients):
        raise AssertionError("nothing depends on it")


class _Recomputed:
    """The inputs of a call, from the recomputation of the layer around it."""

    def __init__(self, saver: torch.Tensor):
        self._saver = saver  # the tensor, since its node alone would let go what it has saved
        self._tensors: Sequence[torch.Tensor] | None = None

    def __call__(self) -> Sequence[torch.Tensor]:
        if self._tensors is None:
            node: Any = self._saver.grad_fn
            self._tensors = node.saved_tensors  # a checkpoint gives each of them once
        return self._tensors


class _Outputs:
    """The first `count` tensors are what a call has returned; the others are what its kernel has saved beside them."""

    def __init__(self, tensors: Sequence[torch.Tensor], count: int, is_single: bool, put: Put):
        self._count, self._is_single = count, is_single
        self._with_gradient = [x.requires_grad for x in tensors]
        self._fetch = put([x.detach() for x in tensors])
        self._here: Sequence[torch.Tensor] | None = None

    def __call__(self) -> Sequence[torch.Tensor]:
        self._here = self._fetch() if self._here is None else self._here
        return self._here

    def again(self) -> Any:
        """What the call has returned, for a graph that only serves to save tensors in the same order."""
        pairs = zip(self()[: self._count], self._with_gradient, strict=False)
        returned = tuple(x.detach().requires_grad_(has_gradient) for x, has_gradient in pairs)
        return returned[0] if self._is_single else returned


class _Slot:
    """A tensor that a kernel saves: until the kernel has returned itself, then a view of an input or of an output."""

    def __init__(self, x: torch.Tensor):
        self.tensor: torch.Tensor | None = x.detach()
        self._source: Callable[[], Sequence[torch.Tensor]] | None = None

    def settle(
        self,
        inputs: Sequence[torch.Tensor],
        recomputed: _Recomputed,
        outputs: Sequence[torch.Tensor],
        stored: _Outputs,
    ) -> None:
        """Lets the tensor go if it is a view of an input or an output; others are tables that all layers share."""
        x = self.tensor
        assert x is not None
        for tensors, source in ((inputs, recomputed), (outputs, stored)):
            for index, base in enumerate(tensors):
                if _share_storage(x, base):
                    self._source, self._index = source, index
                    self._shape, self._strides = x.shape, x.stride()
                    self._offset = x.storage_offset() - base.storage_offset()
                    self.tensor = None
                    return

    def get(self) -> torch.Tensor:
        if self._source is None:
            assert self.tensor is not None
            return self.tensor
        base = self._source()[self._index]
        return base.as_strided(self._shape, self._strides, base.storage_offset() + self._offset)


def _is_own(x: torch.Tensor | None, others: Sequence[torch.Tensor]) -> bool:
    """Whether a saved tensor is a result of the kernel beside those that it returns."""
    return x is not None and x.is_floating_point() and x.numel() > 0 and not any(_share_storage(x, y) for y in others)


def _share_storage(x: torch.Tensor, y: torch.Tensor) -> bool:
    same = x.dtype == y.dtype and x.device == y.device and x.numel() > 0
    return same and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
