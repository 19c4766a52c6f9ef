"""One step of decoding with a cache of fixed storage: a pass of the model, which a CUDA graph replays on a GPU.

Between two compressions every step runs the same kernels on the same addresses. The places of its tokens are read from
tensors (`Step`), and layers are compressed between steps.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lrsa_ds.attention.decoding import Step
from lrsa_ds.attention.recompiling import allow_recompiling
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.keywords import unfit_for_steps
from lrsa_ds.models.step_graph import join_operators

WARM_UPS = 2  # passes before a capture: kernels are compiled, and libraries allocate memory


class CaptureError(LRSAError):
    """A CUDA graph cannot capture the passes of a model."""


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a CUDA graph can capture a pass of the model: all its parameters are on one CUDA device."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


class Decoder:
    """Passes of one token for each row. A cache keeps its decoder, so that one graph serves several calls.

    Args:
        captures: whether steps are replayed from a CUDA graph.
        compiles: whether `torch.compile` compiles them, or the name of its backend.

    Raises:
        LRSAError: the model caches keys in a way that steps do not know.
    """

    def __init__(self, model: PreTrainedModel, captures: bool, compiles: bool | str = False):
        reason = unfit_for_steps(model)
        require(
            reason is None,
            f"{type(model).__name__} {reason}, so lrsa_ds.generate cannot serve it: use model.generate.",
        )
        self.model, self.captures, self.compiles = model, captures, compiles
        self._graph: torch.cuda.CUDAGraph | None = None
        self._storage: list[tuple[int, torch.Size]] = []  # that the graph reads and writes

    @classmethod
    def behind(
        cls, cache: LagKVCache, model: PreTrainedModel, captures: bool, compiles: bool | str = False
    ) -> "Decoder":
        """The decoder of a cache; a new one if it has none for this model and these settings."""
        given, old = (model, captures, compiles), cache.decoder
        if not isinstance(old, Decoder) or (old.model, old.captures, old.compiles) != given:
            cache.decoder = cls(*given)
        return cast(Decoder, cache.decoder)

    def __reduce__(self):
        """Decoders are not copied: a copy of a cache has another storage, which needs another graph."""
        return type(None), ()

    def start(self, cache: LagKVCache) -> None:
        """Prepares for the first step after the tokens that the cache holds now."""
        storage = cache.storage
        if storage != self._storage:
            self._storage, self._graph = storage, None
            self._step = cache.next_step()
            self._logits_after = _compiled(self.compiles) if self.compiles else _logits_after
            if self.compiles:
                for states in self._step.storages:
                    for x in states:  # so that caches of all sizes share what is compiled
                        torch._dynamo.maybe_mark_dynamic(x, 2)
            self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.model.device)
        else:
            cache.place(self._step)
        self._uncounted, self._to_drop = 0, cache.tokens_to_drop

    def __call__(self, cache: LagKVCache, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after tokens [B]: [B, vocabulary]; the next call may overwrite them.

        They count only after `end_step`.
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
        """After a step whose tokens count. The cache is told in `finish`, or when something has to be compressed."""
        cache.states.count_token()
        self._uncounted += 1
        if self._uncounted < self._to_drop:
            self._step.advance()
        else:
            self.finish(cache)
            cache.place(self._step)
            self._to_drop = cache.tokens_to_drop

    def finish(self, cache: LagKVCache) -> None:
        """Tells the cache of the tokens since it was told last; to be called after the last step, also of a failure."""
        if self._uncounted:
            cache.count_tokens(self._uncounted)
            self._uncounted = 0

    @torch.no_grad()
    def _pass(self, cache: LagKVCache) -> torch.Tensor:
        cache.begin_pass(None, self._step)
        try:
            return self._logits_after(self.model, self._tokens, cache, self._step)
        finally:
            cache.end_pass()

    def _capture(self, cache: LagKVCache) -> None:
        """Captures the graph. Each pass stores the same values at the same place, so the warm-up changes nothing.

        Raises:
            CaptureError: the pass waits for the device, as where experts are chosen on the host.
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
                raise CaptureError(f"a pass of {name} cannot be captured as a CUDA graph: give graph=False.") from error
        self._graph = graph


def _logits_after(model: PreTrainedModel, tokens: torch.Tensor, cache: LagKVCache, step: Step) -> torch.Tensor:
    return cast(Any, model)(tokens, past_key_values=cache, use_cache=True, step=step).logits[:, -1]


@lru_cache
def _compiled(backend: bool | str) -> Callable[..., torch.Tensor]:
    """`_logits_after`, compiled: once for a model and a number of rows, since no shape else differs between caches."""
    compile_graph = cast(Any, torch._dynamo.lookup_backend(backend if isinstance(backend, str) else "inductor"))

    def with_joined_operators(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        join_operators(module.graph)
        module.recompile()
        return compile_graph(module, inputs)

    # Not `dynamic`: a second number of rows would be compiled for any number, and kernels for few rows not be chosen.
    allow_recompiling()
    return torch.compile(_logits_after, backend=with_joined_operators, dynamic=False)


class HostCopy:
    """A copy of a tensor on the host that runs while the device continues."""

    def __init__(self, x: torch.Tensor):
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._arrival = torch.cuda.Event() if x.is_cuda else None
        if self._arrival is None:
            self._copy.copy_(x)
            return
        # On the stream of the kernels, the next one would wait until the copy has been made.
        stream = _copy_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._copy.copy_(x, non_blocking=True)
            self._arrival.record()
        x.record_stream(stream)

    def wait(self) -> torch.Tensor:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
