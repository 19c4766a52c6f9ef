"""Recurrent layers (linear attention, state-space models, short convolutions) beside LRSA.

They keep what they are. Their modules know neither packed documents nor rows at different places, so each document and
each row goes through them by itself; behind a `LagKVCache`, with the state of its row.

Shapes: B rows, N tokens, C channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, signature, unwrap
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lrsa_ds.attention.ragged import Rows
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layer_ranges import ranges_of
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.keywords import keywords_of
from lrsa_ds.models.parts import decoder_of
from lrsa_ds.models.passes import is_under_lrsa
from lrsa_ds.models.states import State, as_cache, new_state, tensors_of

CACHES = ("cache_params", "past_key_values")  # how modules call their cache
# Attributes that are set on layers with recurrent modules, and on these modules.
MODULES, TOKENS, FORWARD = "recurrent_modules", "tokens_of_pass", "forward_before_lrsa"
CHECKPOINT = "_gradient_checkpointing_func"  # of layers of transformers

Run = Callable[[torch.Tensor, State | None], Any]  # a module on hidden states, with a state or from none on


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of a pass: the lengths of its documents, or, behind a cache, its rows if they differ."""

    document_lengths: tuple[int, ...] | None
    rows: Rows | None
    is_step: bool


def is_recurrent(module: nn.Module) -> bool:
    """Whether the forward of a module keeps a state in a cache."""
    return _keeps_state(type(module))


@lru_cache
def _keeps_state(kind: type[nn.Module]) -> bool:
    code = getattr(unwrap(kind.forward), "__code__", None)
    return code is not None and not {"update_conv_state", "update_recurrent_state"}.isdisjoint(code.co_names)


@lru_cache
def _continues(kind: type[nn.Module]) -> bool:
    """Whether several tokens at once may follow a state: the scan of Mamba-1 starts from zeros."""
    if "update_recurrent_state" not in unwrap(kind.forward).__code__.co_names:
        return True
    return not {"initial_state", "initial_states"}.isdisjoint(keywords_of(kind))


def recurrent_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_recurrent(module)]


def check_unshared(model: PreTrainedModel, sp_size: int) -> None:
    """Raises LRSAError if ranks would share sequences in recurrent layers."""
    found = recurrent_modules(decoder_of(model))
    if sp_size == 1 or not found:
        return
    layers = sorted({module.layer_idx for module in found})
    kinds = ", ".join(sorted({type(module).__name__ for module in found}))
    raise LRSAError(
        f"parallel.sp_size={sp_size} shares a sequence between ranks, and {ranges_of(layers)} of "
        f"{type(model).__name__} ({kinds}) carr{'y' if len(layers) > 1 else 'ies'} a state from each token to the "
        "next, on one rank: set parallel.sp_size=1."
    )


def keep_documents_apart(model: PreTrainedModel) -> None:
    """Recurrent layers start anew in each document, and use the states of a `LagKVCache`, from now on, under LRSA."""
    for layer in decoder_of(model).modules():
        if not isinstance(layer, GradientCheckpointingLayer) or hasattr(layer, MODULES):
            continue
        if found := recurrent_modules(layer):
            setattr(layer, MODULES, tuple(found))  # in a tuple they are no children
            layer.register_forward_pre_hook(_tell, with_kwargs=True)
    for module in recurrent_modules(decoder_of(model)):
        if not hasattr(module, TOKENS):
            setattr(module, TOKENS, None)
            setattr(module, FORWARD, module.__dict__.get("forward"))
            # It has the name of the method that it overrides, so that a pickled model can be loaded.
            module.forward = MethodType(forward, module)
            if _limits_time_steps(module):
                module.in_proj.register_forward_hook(_Limited(module))


def _limits_time_steps(module: Any) -> bool:
    return tuple(getattr(module, "time_step_limit", (0, math.inf))) != (0, math.inf)


class _Limited:
    """Hook behind the projection of a Mamba-2 module that makes its time steps: it limits them in every pass.

    The scan over several tokens limits them too, and the step of a single token does not (Nemotron-H).
    """

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, projection: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Limits the last channels, one for each head, such that softplus(x * scale + bias) is within the limits."""
        tokens: _Tokens | None = getattr(self.module, TOKENS)
        if tokens is None or output.shape[1] > 1:
            return None
        bias, limits = self.module.dt_bias, self.module.time_step_limit
        least, most = (_before_softplus(limit) - bias.float() for limit in limits)
        vector = getattr(self.module, "mup_vector", None)  # FalconH1 multiplies the projection with it
        scale = 1.0 if vector is None else vector[..., -len(bias) :].float()
        steps = output[..., -len(bias) :]
        limited = ((steps.float() * scale).clamp(least, most) / scale).to(steps.dtype)
        return torch.cat([output[..., : -len(bias)], limited], dim=-1)


def _before_softplus(x: float) -> float:
    return -math.inf if x <= 0 else x + math.log(-math.expm1(-x)) if x < math.inf else math.inf


def _tell(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hook before the pass of a layer: its modules learn of the tokens, also where it is recomputed later.

    A pass under another attention than LRSA is that of the stock model.
    """
    tokens = None
    if is_under_lrsa(kwargs):
        is_step = kwargs.get("step") is not None
        tokens = _Tokens(kwargs.get("document_lengths"), kwargs.get("rows"), is_step)
    _set_tokens(layer, tokens)
    checkpoint = getattr(layer, CHECKPOINT, None)
    if checkpoint is not None and not isinstance(checkpoint, _Checkpoint):
        setattr(layer, CHECKPOINT, _Checkpoint(checkpoint, layer))


def _set_tokens(layer: nn.Module, tokens: _Tokens | None) -> None:
    for module in getattr(layer, MODULES):
        setattr(module, TOKENS, tokens)


class _Checkpoint:
    """The function by which a layer is checkpointed, such that its modules learn of the tokens again in recomputation.

    transformers recomputes only its forward, without hooks, and other passes may have come in between.
    """

    def __init__(self, function: Callable[..., Any], layer: nn.Module):
        self.function, self.layer = function, layer

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        layer, tokens = self.layer, getattr(getattr(self.layer, MODULES)[0], TOKENS)

        def run_again(*args: Any) -> Any:
            _set_tokens(layer, tokens)
            return run(*args)

        return self.function(run_again, *args)


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a recurrent module."""
    stock = getattr(self, FORWARD) or MethodType(type(self).forward, self)
    tokens: _Tokens | None = getattr(self, TOKENS)
    if tokens is None:
        return stock(*args, **kwargs)
    # What a module gets beside these is meant for its kernels, such as the documents of the complete row.
    names = [name for name, p in signature(stock).parameters.items() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    given = dict(zip(names, args, strict=False)) | {name: x for name, x in kwargs.items() if name in names}
    cache_name = next(name for name in CACHES if name in names)
    hidden, cache = given.pop(names[0]), given.pop(cache_name, None)

    def run(hidden: torch.Tensor, state: State | None) -> Any:
        own = None if state is None else as_cache(state, self.layer_idx)
        return stock(**given, **{names[0]: hidden, cache_name: own})

    if cache is None:
        return _of_documents(run, hidden, tokens.document_lengths)
    if not isinstance(cache, LagKVCache):
        return stock(*args, **kwargs)  # the attention function raises the error
    return _behind_cache(run, hidden, cache, tokens, self)


def _of_documents(run: Run, hidden: torch.Tensor, lengths: tuple[int, ...] | None) -> Any:
    """The output for packed documents, each by itself; `lengths` as in `attend_rows`."""
    num_rows, num_tokens = hidden.shape[:2]
    if lengths is None or len(lengths) == 1:
        return run(hidden, None)
    require(
        sum(lengths) in (num_tokens, num_rows * num_tokens),
        f"a recurrent layer was given {num_tokens} tokens of documents of {sum(lengths)}: ranks cannot share a "
        "sequence there, so set parallel.sp_size=1.",
    )
    if sum(lengths) == num_tokens:
        return _joined([run(part, None) for part in hidden.split(lengths, dim=1)])
    parts = hidden.reshape(1, num_rows * num_tokens, -1).split(lengths, dim=1)
    output = _joined([run(part, None) for part in parts])
    return _changed(output, lambda x: x.view(num_rows, num_tokens, *x.shape[2:]))


def _behind_cache(run: Run, hidden: torch.Tensor, cache: LagKVCache, tokens: _Tokens, module: Any) -> Any:
    """The output for the next tokens of each row, whose states the cache holds."""
    states, layer, rows = cache.states, module.layer_idx, tokens.rows
    if tokens.is_step:
        return run(hidden, states.of_step(layer))
    if rows is None or rows.is_unpadded:
        state = states.of_layer(layer)
        output = _continued(run, hidden, state, module)
        states.hold(layer, state)
        return output
    found: list[State | None] = [None] * len(rows.seen)
    outputs: list[Any] = [None] * len(rows.seen)
    for row, (seen, places) in enumerate(zip(rows.seen, rows.places, strict=True)):
        if len(places):
            found[row] = states.of_row(layer, row) if seen else new_state()
            own = hidden[row : row + 1].index_select(1, places.to(hidden.device))
            outputs[row] = _continued(run, own, found[row], module)
    some = next((output for output in outputs if output is not None), None)
    if some is None:  # a pass of padding
        return run(hidden, new_state())
    states.hold_rows(layer, found)

    def spread(*parts: torch.Tensor) -> torch.Tensor:
        """Rows of tokens in the columns of the pass, with zeros in padding."""
        spread = parts[0].new_zeros(*hidden.shape[:2], *parts[0].shape[2:])
        given = iter(parts)
        for row, places in enumerate(rows.places):
            if len(places):
                spread[row].index_copy_(0, places.to(hidden.device), next(given)[0])
        return spread

    return _changed_together([output for output in outputs if output is not None], spread)


def _continued(run: Run, hidden: torch.Tensor, state: State, module: nn.Module) -> Any:
    """The output for tokens behind a state, which is changed in place."""
    if _continues(type(module)) or not tensors_of(state):
        return run(hidden, state)
    return _joined([run(token, state) for token in hidden.split(1, dim=1)])


def _joined(outputs: Sequence[Any]) -> Any:
    return _changed_together(outputs, lambda *parts: torch.cat(parts, dim=1))


def _changed(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return _changed_together([output], change)


def _changed_together(outputs: Sequence[Any], change: Callable[..., torch.Tensor]) -> Any:
    """`change` of outputs of a module that belong together: tensors, or tuples of such."""
    if isinstance(outputs[0], tuple):
        return tuple(_changed_together(parts, change) for parts in zip(*outputs, strict=True))
    return None if outputs[0] is None else change(*outputs)
