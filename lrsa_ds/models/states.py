"""What recurrent layers carry from token to token, in a `LagKVCache`: a state for each of them.

A state is a cache layer of transformers (`LinearAttentionLayer`): the last inputs of a convolution, and the state of a
recurrence, with a row for each row of the batch. A pass works on a copy, which then takes its place.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache

from lrsa_ds.errors import LRSAError, require

State = Any  # LinearAttentionLayer


def new_state() -> State:
    # The older transformers that kvpress needs has no such class.
    from transformers.cache_utils import LinearAttentionLayer

    return LinearAttentionLayer()


def is_state(layer: Any) -> bool:
    """Whether a layer of a cache has a state."""
    return hasattr(layer, "conv_states") and hasattr(layer, "recurrent_states")


def tensors_of(state: State) -> list[torch.Tensor]:
    held = [x for name in ("conv_states", "recurrent_states") for x in getattr(state, name).values()]
    return [x for x in held if x is not None]


def with_tensors(state: State, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    """A copy of a state whose tensors are changed."""
    other = copy.copy(state)
    for name, held in vars(state).items():
        if isinstance(held, dict):
            setattr(other, name, {i: change(x) if isinstance(x, torch.Tensor) else x for i, x in held.items()})
    return other


def as_cache(state: State, layer: int) -> Cache:
    """A cache for a module of layer `layer`, which asks for no other layer."""
    return Cache(layers=[state] * (layer + 1))


class States:
    """The states of the layers of a cache; a layer has none before its first token.

    Args:
        is_fixed: whether tensors stay where they are, for a cache of fixed storage.

    Attributes:
        held: by layer.
        ahead: of a step of decoding, by layer: what `held` becomes when the step is counted.
    """

    def __init__(self, is_fixed: bool):
        self.is_fixed = is_fixed
        self.held: dict[int, State] = {}
        self.ahead: dict[int, State] = {}

    def of_layer(self, layer: int) -> State:
        """A copy of the state of a layer, for a pass."""
        held = self.held.get(layer)
        return with_tensors(held, torch.clone) if held is not None and _is_filled(held) else new_state()

    def of_row(self, layer: int, row: int) -> State:
        """That of one row."""
        return with_tensors(self.held[layer], lambda x: x[row : row + 1].clone())

    def of_step(self, layer: int) -> State:
        """A copy of the state of a layer whose tensors are the same at every step."""
        _copy_tensors(self.held[layer], self.ahead[layer])
        return self.ahead[layer]

    def hold(self, layer: int, state: State) -> None:
        """Takes the state of a layer after a pass."""
        held = self.held.get(layer)
        if self.is_fixed and held is not None and _shapes(held) == _shapes(state):
            _copy_tensors(state, held)
            held.has_previous_state = dict(state.has_previous_state)
        else:
            self.held[layer] = with_tensors(state, torch.detach) if self.is_fixed else state

    def hold_rows(self, layer: int, rows: Sequence[State | None]) -> None:
        """Takes the states of the rows of a batch; those without a token, None, keep theirs, at first zeros."""
        held, some = self.held.get(layer), next(state for state in rows if state is not None)
        each = []
        for row, state in enumerate(rows):
            if state is None:
                state = with_tensors(some, torch.zeros_like) if held is None else self.of_row(layer, row)
            each.append(tensors_of(state))
        joined = map(torch.cat, zip(*each, strict=True))
        self.hold(layer, with_tensors(some, lambda _: next(joined)))

    def take(self, cache: Cache) -> None:
        """Copies what another cache has, of any kind."""
        states = getattr(cache, "states", None)
        found = states.held if isinstance(states, States) else dict(enumerate(cache.layers))
        for layer, state in found.items():
            if is_state(state) and _is_filled(state):
                self.hold(layer, with_tensors(state, torch.clone))

    def begin_steps(self) -> None:
        """Allocates what `of_step` returns."""
        self.ahead = {layer: with_tensors(held, torch.clone) for layer, held in self.held.items()}

    def count_token(self) -> None:
        """After a step that counts."""
        for layer, state in self.ahead.items():
            _copy_tensors(state, self.held[layer])

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer, state in self.held.items():
            self.hold(layer, with_tensors(state, change))

    def reset(self) -> None:
        if not self.is_fixed:
            self.held = {}
        for state in self.held.values():
            state.reset()

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for state in self.held.values() for x in tensors_of(state)]


class KeylessLayer:
    """In the place of the keys and values of a layer that has none, in the list of layers of a cache."""

    is_compileable, is_croppable, supports_early_init = True, False, False

    def reset(self) -> None: ...  # there is nothing to do

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...

    def get_max_length(self) -> int:
        return -1  # as transformers says that there is none

    def update(self, *args, **kwargs) -> None:
        raise LRSAError("a layer without attention was given keys and values: make a cache with lrsa_ds.new_cache.")

    def crop(self, tokens_to_remove: int) -> None:
        raise LRSAError("a LagKVCache cannot be cut back: copy it (copy.deepcopy) first.")


def _is_filled(state: State) -> bool:
    return any(state.has_previous_state.values())


def _shapes(state: State) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(x.shape, x.dtype, x.device) for x in tensors_of(state)]


def _copy_tensors(source: State, target: State) -> None:
    require(_shapes(source) == _shapes(target), "the rows of recurrent layers have changed: make another LagKVCache.")
    for x, y in zip(tensors_of(source), tensors_of(target), strict=True):
        y.copy_(x.detach())
