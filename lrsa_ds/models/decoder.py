"""One step of decoding behind a cache of fixed storage: a pass of the model, which a CUDA graph replays on a GPU.

Between two compressions every step runs the same kernels on the same addresses. Where its tokens go is read from
tensors (`Step`), and layers are compressed between two steps.
"""

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lrsa_ds.models.cache import LagKVCache

WARM_UPS = 2  # passes before a capture, in which kernels are compiled and libraries take their memory


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a CUDA graph can hold a pass of the model: all of it is on one CUDA device."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


class Decoder:
    """Passes of one token of each row. It stays with its cache, so that a graph serves several calls.

    Args:
        captures: whether steps are replayed from a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, captures: bool):
        self.model, self.captures = model, captures
        self._graph: torch.cuda.CUDAGraph | None = None
        self._storage: list[tuple[int, torch.Size]] = []  # where the graph writes and reads

    @classmethod
    def behind(cls, cache: LagKVCache, model: PreTrainedModel, captures: bool) -> "Decoder":
        """That of a cache, or a new one for it."""
        if not isinstance(cache.decoder, Decoder) or (cache.decoder.model, cache.decoder.captures) != (model, captures):
            cache.decoder = cls(model, captures)
        return cache.decoder

    def __reduce__(self):
        """A copy of a cache has another storage, for which a graph is captured anew."""
        return type(None), ()

    def start(self, cache: LagKVCache) -> None:
        """Before the first step behind what the cache holds now."""
        storage = cache.storage
        if storage != self._storage:
            self._storage, self._graph = storage, None
            self._step = cache.next_step()
            self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.model.device)
        else:
            cache.place(self._step)

    def __call__(self, cache: LagKVCache, tokens: torch.Tensor) -> torch.Tensor:
        """Logits behind tokens [B], [B, vocabulary]; the next call may write to the same memory.

        What the cache holds counts the tokens only after `end_step`.
        """
        self._tokens.copy_(tokens[:, None])
        if not self.captures:
            return self._pass(cache)
        if self._graph is None:
            self._capture(cache)
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def end_step(self, cache: LagKVCache) -> None:
        cache.end_step(self._step)

    @torch.no_grad()
    def _pass(self, cache: LagKVCache) -> torch.Tensor:
        return cast(Any, self.model)(self._tokens, past_key_values=cache, use_cache=True, step=self._step).logits[:, -1]

    def _capture(self, cache: LagKVCache) -> None:
        """A pass stores the same at the same place each time, so that warming up changes nothing."""
        with torch.cuda.device(self._tokens.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._pass(cache)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._pass(cache)
        self._graph = graph


class HostCopy:
    """A copy of a tensor on the host, under way while the device goes on."""

    def __init__(self, x: torch.Tensor):
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._copy.copy_(x, non_blocking=True)
        self._arrival = torch.cuda.Event() if x.is_cuda else None
        if self._arrival is not None:
            self._arrival.record()

    def wait(self) -> torch.Tensor:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy
