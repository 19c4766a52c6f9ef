"""One step of decoding with a cache of fixed storage: a pass of the model, which a CUDA graph replays on a GPU.

Between two compressions every step runs the same kernels on the same addresses. The places of its tokens are read from
tensors (`Step`), and layers are compressed between steps.
"""

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lrsa_ds.errors import LRSAError
from lrsa_ds.models.cache import LagKVCache

WARM_UPS = 2  # passes before a capture: kernels are compiled, and libraries allocate memory


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a CUDA graph can capture a pass of the model: all its parameters are on one CUDA device."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


class Decoder:
    """Passes of one token for each row. A cache keeps its decoder, so that one graph serves several calls.

    Args:
        captures: whether steps are replayed from a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, captures: bool):
        self.model, self.captures = model, captures
        self._graph: torch.cuda.CUDAGraph | None = None
        self._storage: list[tuple[int, torch.Size]] = []  # that the graph reads and writes

    @classmethod
    def behind(cls, cache: LagKVCache, model: PreTrainedModel, captures: bool) -> "Decoder":
        """The decoder of a cache; a new one if it has none for this model."""
        if not isinstance(cache.decoder, Decoder) or (cache.decoder.model, cache.decoder.captures) != (model, captures):
            cache.decoder = cls(model, captures)
        return cache.decoder

    def __reduce__(self):
        """Decoders are not copied: a copy of a cache has another storage, which needs another graph."""
        return type(None), ()

    def start(self, cache: LagKVCache) -> None:
        """Prepares for the first step after the tokens that the cache holds now."""
        storage = cache.storage
        if storage != self._storage:
            self._storage, self._graph = storage, None
            self._step = cache.next_step()
            self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.model.device)
        else:
            cache.place(self._step)

    def __call__(self, cache: LagKVCache, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after tokens [B]: [B, vocabulary]; the next call may overwrite them.

        The cache counts the tokens only in `end_step`.
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
        """Captures the graph. Each pass stores the same values at the same place, so the warm-up changes nothing.

        Raises:
            LRSAError: the pass waits for the device, as where experts are chosen on the host.
        """
        with torch.cuda.device(self._tokens.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._pass(cache)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._logits = self._pass(cache)
            except RuntimeError as error:
                name = type(self.model).__name__
                raise LRSAError(f"a pass of {name} cannot be captured as a CUDA graph: give graph=False.") from error
        self._graph = graph


class HostCopy:
    """A copy of a tensor on the host that runs while the device continues."""

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
