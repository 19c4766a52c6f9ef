"""A KV cache that keeps what LRSA keeps: sink, kept KV of past partitions, and all of the last one and since.

Source: LagKV, arXiv 2504.04704. New tokens first attend to all that is there; then every partition that has a whole
partition after it is cut down to its kept KV. That is the function which LRSA attention computes in training.
"""

from typing import Any, cast

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lrsa_ds.attention.kept_buffer import gather_kept
from lrsa_ds.attention.partition import mean_of, num_compressed_partitions
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import fast_select_partitions
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layers import AnyConfig
from lrsa_ds.lrsa_config import LRSAConfig


class LagKVLayer(DynamicLayer):
    """The cache of one layer; `keys` and `values` are [B, G, length, D], as `LagKVCache` describes."""

    is_croppable = False

    def __init__(self, config: LRSAConfig, index: int = 0):
        super().__init__()
        self.config, self.index = config, index
        self.cumulative_length = 0  # tokens seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the keys and values of n new tokens; returns those that the new tokens attend to: cached, then new."""
        self._check_batch(key_states)
        keys, values = super().update(key_states, value_states)
        before = num_compressed_partitions(self.cumulative_length, self.config)
        self.cumulative_length += key_states.shape[2]
        self._compress(before, num_compressed_partitions(self.cumulative_length, self.config))
        return keys, values

    def _check_batch(self, key_states: torch.Tensor) -> None:
        held, given = (0 if x is None or x.numel() == 0 else x.shape[0] for x in (self.keys, key_states))
        require(
            held in (0, given),
            f"the cache holds a batch of {held} and was given one of {given}: make a new LagKVCache for another batch, "
            f"or, for {given} beams or samples of it, call cache.batch_repeat_interleave first.",
        )

    @torch.no_grad()
    def _compress(self, before: int, after: int) -> None:
        """Cuts partitions `before` up to `after` down to their kept KV; the memory of the rest is freed."""
        if before == after:
            return
        config, keys, values = self.config, self.keys, self.values
        assert keys is not None and values is not None
        first = config.sink_size + before * config.num_kept
        partitions = Partitions.adjacent(first, after - before, config.lag_size, keys.device, number=before)
        kept = fast_select_partitions(keys, values, partitions, config, self.index)
        since = first + (after - before) * config.lag_size
        self.keys, self.values = (
            torch.cat([x[:, :, :first], gather_kept(x, kept.flatten(2)), x[:, :, since:]], dim=2)
            for x in (keys, values)
        )

    def get_seq_length(self) -> int:
        """Tokens seen, which is where the next token stands; the cache may hold fewer."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for `query_length` new tokens: as if the first tokens were not there."""
        held = self.keys.shape[2] if self.is_initialized and self.keys is not None else 0
        return held + query_length, self.cumulative_length - held

    def crop(self, tokens_to_remove: int) -> None:
        raise LRSAError(
            "a LagKVCache cannot give tokens back, since what they pushed out is gone: copy it (copy.deepcopy) before "
            "tokens that may be taken back; assisted decoding does not work with it."
        )


class LagKVCache(Cache):
    """For `model.generate(..., past_key_values=cache)`, `lrsa_ds.prefill` and any forward pass.

    After n tokens each layer holds [sink | K kept keys and values of each compressed partition | all tokens since], in
    position order and with their original positions: S + K (floor((n - S) / L) - 1) + L + (n - S) mod L entries for
    n >= S + 2L, and n before.

    The model must be under `apply_lrsa`: new tokens that end a partition and go on into the next have to attend chunk
    by chunk. So a whole prompt may be given at once; `lrsa_ds.prefill` gives it in parts, with bounded memory.

    Args:
        config: sink size, lag size, retention and selection rule, of all layers or of each; `lrsa_ds.new_cache(model)`
            takes those of a model.

    Raises:
        LRSAError: (while in use) another batch size, padding, a model without LRSA attention, or an attempt to crop.
    """

    def __init__(self, config: AnyConfig):
        # Annotated as a class, and called without arguments.
        super().__init__(layer_class_to_replicate=cast(Any, self._next_layer))
        self.config = config
        self.is_attended_by_chunk = False  # set by the model for the time of a pass

    def _next_layer(self) -> LagKVLayer:
        index = len(self.layers)
        return LagKVLayer(self.config.at_layer(index), index)

    @classmethod
    def from_dense(cls, cache: Cache, config: AnyConfig) -> "LagKVCache":
        """What is kept of a cache that was filled under dense attention: "prefill fully, then compress"."""
        compressed = cls(config)
        for index, (keys, values) in enumerate(cached_states(cache)):
            Cache.update(compressed, keys, values, index)  # without a model, whose attention would be checked
        return compressed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`."""
        require(
            self.is_attended_by_chunk,
            "a LagKVCache serves models with LRSA attention, and the attention of this one does not know what the "
            "cache holds: call lrsa_ds.apply_lrsa(model, config) first.",
        )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def batch_size(self) -> int:
        """Rows of which keys and values are held; 0 before the first token."""
        return cached_states(self)[0][0].shape[0] if self.num_held else 0

    @property
    def num_bytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(x.untyped_storage().nbytes() for states in cached_states(self) for x in states)

    @property
    def num_held(self) -> float:
        """Tokens of which a layer holds keys and values for each KV head; the mean over layers that differ."""
        held = [keys.shape[2] for keys, _ in cached_states(self)]
        return mean_of(held) if held else 0


def cached_states(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values, [B, G, length, D] each, of every layer of a cache that has seen tokens."""
    states = [(layer.keys, layer.values) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [(keys, values) for keys, values in states if keys is not None and values is not None]
