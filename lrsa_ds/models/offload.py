"""Offload of checkpointed activations: copied to host memory during the forward pass, and back for the backward pass.

Activation checkpointing stores the input of every decoder layer until its backward pass. `HostStore` stores them in
pinned host memory instead. Copies run on their own stream: while a layer computes, its input is copied to the host, and
while a layer is recomputed, the input of the layer before it is copied back. All copies are on one stream, so a buffer
in host memory is never read or written out of order, and a buffer is pinned once and reused in every pass.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast
from weakref import ReferenceType, ref

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.process.launcher import ranks_of_host


def check_host_memory(config: TrainConfig, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises LRSAError if this host has less memory than the checkpointed activations of its ranks will take."""
    if not config.memory.offload_checkpoints:
        return
    architecture = model.config.get_text_config()
    num_tokens = config.seq_len * config.optim.micro_batch // config.parallel.sp_size
    size = architecture.num_hidden_layers * num_tokens * architecture.hidden_size * dtype.itemsize
    needed, present = size * ranks_of_host(), psutil.virtual_memory().total
    require(
        needed < present,
        f"memory.offload_checkpoints=true needs {needed / 1e9:.0f} GB of host memory for the activations alone, and "
        f"there are {present / 1e9:.0f} GB: lower seq_len, or split a sequence over more hosts (parallel.sp_size).",
    )


def offload_checkpoints(model: PreTrainedModel) -> "HostStore":
    """Stores the checkpoints of `model` in host memory; call it after activation checkpointing was enabled."""
    store = HostStore()
    for module in cast(Iterator[Any], model.modules()):
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            module._gradient_checkpointing_func = store.around(checkpoint)
    return store


class HostStore:
    """Stores tensors that the forward pass saves in host memory until the backward pass needs them.

    Attributes:
        num_saved: number of tensors that were copied to the host so far.
        num_bytes: host memory of the buffers.
    """

    def __init__(self) -> None:
        self.num_saved = self.num_bytes = 0
        self._free: list[torch.Tensor] = []  # flat buffers of bytes
        self._copier: torch.cuda.Stream | None = None
        self._leaving: tuple[torch.cuda.Event, torch.Tensor] | None = None
        self._last: ReferenceType[_Saved] | None = None

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """`checkpoint` whose saved tensors go into this store; tensors saved while it runs do not."""

        def offloaded(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._pack, self._unpack):
                return checkpoint(*args, **kwargs)

        return offloaded

    def _pack(self, x: torch.Tensor) -> "_Saved | torch.Tensor":
        if not x.is_floating_point() or x.numel() == 0:  # torch saves an empty tensor of the CPU with each checkpoint
            return x.detach()
        self._let_go()
        buffer = self._buffer(x)
        saved = _Saved(self, x, buffer, self._last)
        self._last = ref(saved)
        self.num_saved += 1
        if x.is_cuda:
            self._leaving = self._copy(saved.host, x), x.detach()
        else:
            saved.host.copy_(x.detach())
        return saved

    def _unpack(self, saved: "_Saved | torch.Tensor") -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._let_go()
        if saved.device.type != "cuda":
            return saved.host.clone()
        here = self._fetch(saved)
        saved.coming = None
        before = saved.before() if saved.before is not None else None
        if before is not None:
            before.coming = before.coming or self._start(before)
        return here

    def _fetch(self, saved: "_Saved") -> torch.Tensor:
        arrived, here = saved.coming or self._start(saved)
        torch.cuda.current_stream(saved.device).wait_event(arrived)
        return here

    def _start(self, saved: "_Saved") -> "tuple[torch.cuda.Event, torch.Tensor]":
        """Starts the copy back to the GPU. The compute stream owns the target, and waits for the copy."""
        here = torch.empty(saved.host.shape, dtype=saved.host.dtype, device=saved.device)
        return self._copy(here, saved.host), here

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        device = source.device if source.is_cuda else target.device
        copier = self._copier = self._copier or torch.cuda.Stream(device)
        copier.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copier):
            target.copy_(source.detach(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(copier)
        return copied

    def _let_go(self) -> None:
        """Frees the tensor whose copy to the host started last. Later kernels wait for it and may use the memory."""
        if self._leaving is not None:
            event, x = self._leaving
            torch.cuda.current_stream(x.device).wait_event(event)
            self._leaving = None

    def _buffer(self, x: torch.Tensor) -> torch.Tensor:
        num_bytes = x.numel() * x.element_size()
        fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
        if fitting:
            smallest = min(fitting, key=len)
            self._free = [buffer for buffer in self._free if buffer is not smallest]
            return smallest
        self.num_bytes += num_bytes
        return _pinned(num_bytes) if x.is_cuda else torch.empty(num_bytes, dtype=torch.uint8)

    def take_back(self, saved: "_Saved") -> None:
        """Called when the autograd graph releases `saved`: its buffer is free for the next copy."""
        if saved.coming is not None:  # it was fetched but not used: its GPU memory must outlive the copy
            torch.cuda.current_stream(saved.device).wait_event(saved.coming[0])
        self._free.append(saved.buffer)


class _Saved:
    """A tensor in host memory: `host`, at the start of `buffer`; `before` is the tensor that was saved before it."""

    def __init__(
        self, store: HostStore, x: torch.Tensor, buffer: torch.Tensor, before: "ReferenceType[_Saved] | None"
    ) -> None:
        self.store, self.device, self.buffer, self.before = store, x.device, buffer, before
        self.host = buffer[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        self.coming: tuple[torch.cuda.Event, torch.Tensor] | None = None

    def __del__(self) -> None:
        self.store.take_back(self)


def _pinned(num_bytes: int) -> torch.Tensor:
    """Pinned host memory, which a GPU copies directly. torch's allocator would round its size up to a power of two."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)) != 0:
        raise LRSAError(
            f"memory.offload_checkpoints=true could not pin {num_bytes / 1e9:.2f} GB of host memory: raise the limit "
            "of locked memory (ulimit -l), lower seq_len, or set it to false."
        )
    return buffer
