"""Offload of checkpointed activations: copied to host memory during the forward pass, and back for the backward pass.

Activation checkpointing stores the input of every decoder layer until its backward pass. `HostStore` stores them in
pinned host memory instead, and with them the outputs of attention, if these are saved. Copies run on their own stream:
while a layer computes, its tensors are copied to the host, and while a layer is recomputed, those of the layer before
it are copied back. All copies are on one stream, so a buffer in host memory is never read or written out of order, and
a buffer is pinned once and reused in every pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import ReferenceType, finalize, ref

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.models.heads import head_dims
from lrsa_ds.process.launcher import ranks_of_host


def check_host_memory(config: TrainConfig, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises LRSAError if this host has less memory than the checkpointed activations of its ranks will take."""
    if not config.memory.offload_checkpoints:
        return
    architecture = model.config.get_text_config()
    num_tokens = config.seq_len * config.optim.micro_batch // config.parallel.sp_size
    width = architecture.hidden_size * dtype.itemsize
    if config.memory.save_attention:
        width += attention_width(architecture.num_attention_heads, head_dims(architecture).values, dtype.itemsize)
    size = architecture.num_hidden_layers * num_tokens * width
    needed, present = size * ranks_of_host(), psutil.virtual_memory().total
    require(
        needed < present,
        f"memory.offload_checkpoints=true needs {needed / 1e9:.0f} GB of host memory for the activations alone, and "
        f"there are {present / 1e9:.0f} GB: lower seq_len, or split a sequence over more hosts (parallel.sp_size).",
    )


def attention_width(num_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a token that `memory.save_attention` saves in a layer: the output, and the log-sum-exp in fp32."""
    return num_heads * (head_dim * itemsize + torch.float32.itemsize)


def offload_checkpoints(model: PreTrainedModel, store: "HostStore | None" = None) -> "HostStore":
    """Stores the checkpoints of `model` in host memory; call it after activation checkpointing was enabled."""
    store = store or HostStore()
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
        self._pinned: list[torch.Tensor] = []  # those that are pinned, whether free or not
        unpin: Any = finalize(self, _unpin, self._pinned)
        unpin.atexit = False  # a process that ends lets go of it anyway, and may end because a GPU hangs
        self._copier: torch.cuda.Stream | None = None
        self._leaving: list[tuple[torch.cuda.Event, torch.Tensor]] = []
        self._layer = _Layer(None)

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """`checkpoint` whose saved tensors go into this store; tensors saved while it runs do not."""

        def offloaded(*args: Any, **kwargs: Any) -> Any:
            self._layer = _Layer(ref(self._layer))
            with saved_tensors_hooks(self._pack, self._unpack):
                return checkpoint(*args, **kwargs)

        return offloaded

    def put(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Stores tensors of the layer whose checkpoint runs; the function that is returned brings them back."""
        tensors = [x if _is_dense(x) else x.contiguous() for x in tensors]
        self._let_go()
        stored = [self._save(x.as_strided((x.numel(),), (1,))) for x in tensors]
        layouts = [(x.shape, x.stride()) for x in tensors]
        return lambda: [self._unpack(x).as_strided(*layout) for x, layout in zip(stored, layouts, strict=True)]

    def _pack(self, x: torch.Tensor) -> "_Saved | torch.Tensor":
        if not x.is_floating_point() or x.numel() == 0:  # torch saves an empty tensor of the CPU with each checkpoint
            return x.detach()
        self._let_go()
        return self._save(x)

    def _save(self, x: torch.Tensor) -> "_Saved":
        saved = _Saved(self, x, self._buffer(x), self._layer)
        self._layer.saved.append(ref(saved))
        self.num_saved += 1
        if x.is_cuda:
            self._leaving.append((self._copy(saved.host, x), x.detach()))
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
        saved.coming, saved.was_fetched = None, True
        for other in saved.layer.of_this_and_before():
            if not other.was_fetched:
                other.coming = other.coming or self._start(other)
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
        """Frees the tensors whose copies to the host started last. Later kernels wait and may use the memory."""
        for event, x in self._leaving:
            torch.cuda.current_stream(x.device).wait_event(event)
        self._leaving.clear()

    def _buffer(self, x: torch.Tensor) -> torch.Tensor:
        num_bytes = x.numel() * x.element_size()
        fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
        if fitting:
            smallest = min(fitting, key=len)
            self._free = [buffer for buffer in self._free if buffer is not smallest]
            return smallest
        self.num_bytes += num_bytes
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if x.is_cuda:
            _pin(buffer)
            self._pinned.append(buffer)
        return buffer

    def take_back(self, saved: "_Saved") -> None:
        """Called when the autograd graph releases `saved`: its buffer is free for the next copy."""
        if saved.coming is not None:  # it was fetched but not used: its GPU memory must outlive the copy
            torch.cuda.current_stream(saved.device).wait_event(saved.coming[0])
        self._free.append(saved.buffer)


@dataclass(eq=False)
class _Layer:
    """What one pass of a layer has stored; `before` is the layer in front of it."""

    before: "ReferenceType[_Layer] | None"
    saved: "list[ReferenceType[_Saved]]" = field(default_factory=list)

    def of_this_and_before(self) -> "list[_Saved]":
        before = self.before() if self.before is not None else None
        found = [each() for each in [*self.saved, *(before.saved if before is not None else [])]]
        return [saved for saved in found if saved is not None]


class _Saved:
    """A tensor in host memory: `host`, at the start of `buffer`."""

    def __init__(self, store: HostStore, x: torch.Tensor, buffer: torch.Tensor, layer: _Layer) -> None:
        self.store, self.device, self.buffer, self.layer = store, x.device, buffer, layer
        self.host = buffer[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        self.coming: tuple[torch.cuda.Event, torch.Tensor] | None = None
        self.was_fetched = False

    def __del__(self) -> None:
        self.store.take_back(self)


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie one after the other in memory, in whatever order of its dims."""
    return x.numel() > 0 and 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) == x.numel()


def _pin(buffer: torch.Tensor) -> None:
    """Pins host memory, which a GPU copies directly; torch's allocator would round its size up to a power of two."""
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(buffer.data_ptr(), len(buffer), 0)) != 0:
        raise LRSAError(
            f"memory.offload_checkpoints=true could not pin {len(buffer) / 1e9:.2f} GB of host memory: raise the limit "
            "of locked memory (ulimit -l), lower seq_len, or set it to false."
        )


def _unpin(buffers: list[torch.Tensor]) -> None:
    """Ends what `_pin` began. Otherwise CUDA refuses copies of whatever uses these addresses next."""
    if not buffers:
        return
    torch.cuda.synchronize()  # copies may still read or write them
    runtime: Any = torch.cuda.cudart()
    for buffer in buffers:
        runtime.cudaHostUnregister(buffer.data_ptr())
