"""A KV cache that holds what LRSA attention attends to: sink, kept KV of past partitions, and all tokens since.

Source: LagKV, arXiv 2504.04704. New tokens first attend to all entries; then every partition that is followed by a
complete partition is compressed to its kept KV. In training, LRSA attention computes the same function.
"""

from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lrsa_ds.attention.decoding import Step
from lrsa_ds.attention.partition import mean_of
from lrsa_ds.attention.ragged import Rows
from lrsa_ds.errors import LRSAError, require_whole
from lrsa_ds.layers import AnyConfig, MixedConfig, in_model, source_of
from lrsa_ds.models.cache_layers import FixedLagKVLayer, LagKVLayer
from lrsa_ds.models.states import KeylessLayer, States

CLOSED = (
    "a LagKVCache serves models with LRSA attention, and the attention of this one does not know what the cache holds: "
    "call lrsa_ds.apply_lrsa(model, config) first."
)


@dataclass(frozen=True)
class _Pass:
    """The forward pass that fills a cache: `rows` is None if no row has padding, `step` if its tokens are counted.

    `layer_of` has the layer of the keys that the cache has given to the pass, as long as they are in use; `shared` the
    keys and values that it has given to layers whose keys others share.
    """

    rows: Rows | None
    step: Step | None
    layer_of: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class LagKVCache(Cache):
    """For `model.generate(..., past_key_values=cache)`, `lrsa_ds.prefill` and any forward pass.

    After n tokens each layer holds [sink | K kept keys and values of each compressed partition | all tokens since], in
    position order and with their original positions: S + K (floor((n - S) / L) - 1) + L + (n - S) mod L entries for
    n >= S + 2L, and n before.

    The model must be under `apply_lrsa`: new tokens that span two partitions have to attend chunk by chunk. Its
    attention does so, and a complete prompt may be one pass; `lrsa_ds.prefill` splits it, with bounded memory.

    Prompts of different lengths form one batch, padded on the left or on the right, with an `attention_mask`: padding
    is neither attended to nor kept, and each row is compressed as if it were alone.

    Args:
        config: sink size, lag size, retention and selection rule, for all layers or for each;
            `lrsa_ds.new_cache(model)` uses the settings of a model.
        max_tokens: maximum tokens of each row, for a cache of fixed storage: it allocates the memory for them with the
            first tokens, and `lrsa_ds.generate` decodes with it without waiting for the host. It carries no gradient.

    Raises:
        LRSAError: (while in use) another batch size, more than `max_tokens` tokens, a model without LRSA attention, or
            a call of `crop`.
    """

    def __init__(self, config: AnyConfig, max_tokens: int | None = None):
        if max_tokens is not None:
            require_whole("max_tokens", max_tokens, 1)
        # `update` makes the layers. A function of this object here would refer back to it, and the memory of caches
        # that nobody uses would be free only after a garbage collection.
        super().__init__(layer_class_to_replicate=LagKVLayer)
        self.config, self.max_tokens = config, max_tokens
        self._pass: _Pass | None = None  # None between passes
        self.states = States(is_fixed=max_tokens is not None)  # of recurrent layers
        self.answering_layer: int | None = None  # which computes the last token of a pass alone; see `last_token.py`
        self.decoder: object = None  # the state of `lrsa_ds.generate` for this storage

    def begin_pass(self, rows: Rows | None, step: Step | None = None) -> None:
        """Opens the cache for the tokens of one forward pass of a model with LRSA attention."""
        self._pass = _Pass(rows, step)
        if isinstance(self.config, MixedConfig):  # layers without keys do not ask for theirs
            self.layers += [self._next_layer(index) for index in range(len(self.layers), len(self.config.model))]

    @property
    def is_open(self) -> bool:
        """Whether a pass of a model with LRSA attention fills it."""
        return self._pass is not None

    def end_pass(self) -> None:
        """Closes the cache: the next pass may be that of another model."""
        self._pass = None

    def _next_layer(self, index: int | None = None) -> Any:
        index = len(self.layers) if index is None else index
        config = self.config.at_layer(index)
        if not config.has_keys or self._source(index) != index:
            return KeylessLayer()
        return LagKVLayer(config, index) if self.max_tokens is None else FixedLagKVLayer(config, self.max_tokens, index)

    @classmethod
    def from_dense(cls, cache: Cache, config: AnyConfig, max_tokens: int | None = None) -> "LagKVCache":
        """Compresses a cache that was filled under dense attention: "prefill fully, then compress"."""
        if isinstance(cache, LagKVCache) and isinstance(cache.config, MixedConfig):
            config = in_model(config, cache.config.model)
        compressed = cls(config, max_tokens)
        for dense in cache.layers:
            layer = compressed._next_layer()
            if (found := _keys_and_values(dense)) is not None and isinstance(layer, LagKVLayer):
                layer.fill(*found, cache.get_seq_length())
            compressed.layers.append(layer)
        compressed.states.take(cache)
        return compressed

    def fixed(self, max_tokens: int) -> "LagKVCache":
        """A copy of fixed storage, for `lrsa_ds.generate`; this cache stays as it is.

        Raises:
            LRSAError: more than `max_tokens` tokens were seen.
        """
        copied = LagKVCache(self.config, max_tokens)
        copied.take(self)
        return copied

    def take(self, other: "LagKVCache") -> None:
        """Copies what another cache of these settings holds into this one, of fixed storage, instead of its own tokens.

        Storage that fits is used again, and so is the CUDA graph of `lrsa_ds.generate` that reads it.
        """
        for index, layer in enumerate(other.layers):
            if index == len(self.layers):
                self.layers.append(self._next_layer())
            if isinstance(layer, LagKVLayer):
                cast(FixedLagKVLayer, self.layers[index]).take(layer)
        self.states.take(other)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`; only within a pass that `begin_pass` opened.

        Another attention would attend to the compressed cache as if it held every token. In a step it returns the new
        keys and values alone, and the attention stores them.
        """
        if self._pass is None:
            raise LRSAError(CLOSED)
        if self._is_step:
            return key_states, value_states
        while len(self.layers) <= layer_idx:
            self.layers.append(self._next_layer())
        keys, values = super().update(key_states, value_states, layer_idx, *args, rows=self._pass.rows, **kwargs)
        self._pass.layer_of[keys] = layer_idx
        if self._is_shared(layer_idx):
            self._pass.shared[layer_idx] = keys, values
        return keys, values

    def shared(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `update` has returned in this pass of the layer whose keys and values a layer shares.

        None if the layer has its own.
        """
        source = self._source(layer_idx)
        return None if self._pass is None or source == layer_idx else self._pass.shared[source]

    def _source(self, layer_idx: int) -> int:
        return source_of(self.config, layer_idx)

    def _is_shared(self, layer_idx: int) -> bool:
        return isinstance(self.config, MixedConfig) and self.config.model.num_readers(layer_idx) > 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As `Cache.get_mask_sizes`; the token of a step needs no mask, and a compiled step reads no lengths."""
        return (query_length, 0) if self._is_step else super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `Cache.get_query_offset`, for masks; see `get_mask_sizes`."""
        return 0 if self._is_step else super().get_query_offset(layer_idx)

    @property
    def _is_step(self) -> bool:
        return self._pass is not None and self._pass.step is not None

    def held(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values that a layer holds, [B, G, length, D] each, after `update` gave it `keys` in this pass.

        None for other keys, as where a model changes them behind the cache.
        """
        layer_idx = None if self._pass is None else self._pass.layer_of.get(keys)
        layer = None if layer_idx is None else cast(LagKVLayer, self.layers[layer_idx])
        return None if layer is None or layer.keys is None or layer.values is None else (layer.keys, layer.values)

    def get_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """As `Cache.get_conv_state`, which only a recurrent layer of another attention than LRSA calls."""
        raise LRSAError(CLOSED)

    get_recurrent_state = update_conv_state = update_recurrent_state = get_conv_state

    def has_previous_state(self, *args, **kwargs) -> bool:
        """Whether recurrent layers have seen tokens."""
        return self.get_seq_length() > 0

    def next_step(self) -> Step:
        """The step for the next token of each row, in a cache of fixed storage that has seen tokens."""
        self.states.begin_steps()
        keyed = self._with_keys  # the others ask for no storage
        read = self._read_in_steps
        step = Step([layer.storage if isinstance(layer, FixedLagKVLayer) else keyed[0].storage for layer in read])
        self.place(step)
        return step

    def count_tokens(self, count: int) -> None:
        """Counts tokens of each row that steps have stored, at most `tokens_to_drop`; compresses what they complete."""
        for layer in self._with_keys:
            layer.count_tokens(count)

    @property
    def tokens_to_drop(self) -> int:
        """The number of tokens after which a layer drops something for the first time; many if none does."""
        return min(layer.tokens_to_drop for layer in self._with_keys)

    def place(self, step: Step) -> None:
        """Sets a step to the next token of each row."""
        positions = self.row_lengths or (self.get_seq_length(),) * self.batch_size
        layers, nothing = self._read_in_steps, [0] * self.batch_size
        filled = [layer.num_filled if isinstance(layer, LagKVLayer) else 0 for layer in layers]
        firsts = [layer.first_entries if isinstance(layer, LagKVLayer) else nothing for layer in layers]
        step.set(positions, filled, firsts)

    @property
    def _read_in_steps(self) -> list[FixedLagKVLayer]:
        """What each layer reads: one that shares keys and values writes them once more to their place in its source."""
        return [cast(FixedLagKVLayer, self.layers[self._source(index)]) for index in range(len(self.layers))]

    @property
    def storage(self) -> list[tuple[int, torch.Size]]:
        """Address and shape of the stored tensors of each layer, which do not change in a cache of fixed storage."""
        stored = [x for layer in self._with_keys for x in layer.storage]
        return [(x.data_ptr(), x.shape) for x in [*stored, *self.states.tensors]]

    @property
    def _with_keys(self) -> list[FixedLagKVLayer]:
        return [cast(FixedLagKVLayer, layer) for layer in self.layers if isinstance(layer, LagKVLayer)]

    @property
    def row_lengths(self) -> tuple[int, ...] | None:
        """Tokens seen of each row, without padding; None if no row had padding."""
        return self._with_keys[0].row_lengths if self.layers else None

    @property
    def batch_size(self) -> int:
        """Number of rows; 0 before the first token."""
        return cached_states(self)[0][0].shape[0] if self.num_held else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the keys and values take, and the states of recurrent layers."""
        held = [x for states in cached_states(self) for x in states]
        return sum(x.untyped_storage().nbytes() for x in [*held, *self.states.tensors])

    @property
    def num_held(self) -> float:
        """Entries of a layer for each KV head; the mean over layers with keys if they differ."""
        held = [layer.num_held for layer in self._with_keys]
        return mean_of(held) if held else 0

    def reset(self) -> None:
        super().reset()
        self.states.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(cast(Any, beam_idx))
        self.states.change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.states.change_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.states.change_rows(lambda x: x.repeat_interleave(repeats, dim=0))


def cached_states(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values, [B, G, length, D] each, of every layer of a cache that has seen tokens."""
    return [found for layer in cache.layers if (found := _keys_and_values(layer)) is not None]


def _keys_and_values(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        return None
    return layer.keys, layer.values
