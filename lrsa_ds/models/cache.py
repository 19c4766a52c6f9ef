"""A KV cache that keeps what LRSA keeps: sink, kept KV of past partitions, and all of the last one and since.

Source: LagKV, arXiv 2504.04704. New tokens first attend to all that is there; then every partition that has a whole
partition after it is cut down to its kept KV. That is the function which LRSA attention computes in training.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lrsa_ds.attention.kept_buffer import gather_kept
from lrsa_ds.attention.partition import mean_of, num_compressed_partitions, num_held
from lrsa_ds.attention.ragged import Rows, pack_rows, row_of
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import fast_select_partitions
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layers import AnyConfig
from lrsa_ds.lrsa_config import LRSAConfig


class LagKVLayer(DynamicLayer):
    """The cache of one layer; `keys` and `values` are [B, G, length, D], as `LagKVCache` describes.

    Rows that differ lie as `pack_rows` lays them; `row_lengths` are then the tokens seen of each, without padding.
    """

    is_croppable = False

    def __init__(self, config: LRSAConfig, index: int = 0):
        super().__init__()
        self.config, self.index = config, index
        self.cumulative_length = 0  # columns seen: tokens, and padding where rows have some
        self.row_lengths: tuple[int, ...] | None = None  # None if no row has padding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, rows: Rows | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the keys and values of n new tokens; returns those that the new tokens attend to: cached, then new.

        Args:
            rows: where the rows stand, if they differ.
        """
        held = 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[0]
        check_batch(held, key_states.shape[0])
        if rows is not None:
            return self._update_rows(key_states, value_states, rows)
        keys, values = super().update(key_states, value_states)
        before = self.cumulative_length
        self.cumulative_length += key_states.shape[2]
        self.keys, self.values = self._compressed(keys, values, before, self.cumulative_length)
        return keys, values

    def _update_rows(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` of rows that differ: each is compressed where its own tokens complete a partition."""
        self.cumulative_length += key_states.shape[2]
        self.row_lengths = rows.seen_after
        entries = rows.entries(self.config)
        if rows.is_unpadded:
            keys, values = super().update(key_states, value_states)
        else:
            keys, values = self._appended("keys", key_states, rows), self._appended("values", value_states, rows)
        held = [
            self._compressed(row_of(keys, row, length), row_of(values, row, length), before, after)
            for row, (length, before, after) in enumerate(zip(entries, rows.seen, rows.seen_after, strict=True))
        ]
        if all(k.shape[2] == length for (k, _), length in zip(held, entries, strict=True)):
            self.keys, self.values = keys, values
        else:
            self.keys, self.values = pack_rows([k for k, _ in held]), pack_rows([v for _, v in held])
        return keys, values

    def _appended(self, name: str, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The keys or the values of each row with those of its new tokens, [B, G, longest, D]."""
        if not self.is_initialized:
            self.lazy_initialization(states, states)
        held = getattr(self, name)
        new = [rows.tokens_of(states, row) for row in range(len(rows.seen))]
        if held.numel():
            lengths = [int(num_held(seen, self.config)) for seen in rows.seen]
            new = [torch.cat([row_of(held, r, lengths[r]), new[r]], dim=2) for r in range(len(new))]
        return pack_rows(new)

    @torch.no_grad()
    def _compressed(
        self, keys: torch.Tensor, values: torch.Tensor, seen_before: int, seen: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of keys and values once `seen` tokens were seen; compressed as they were at `seen_before`."""
        config = self.config
        before, after = (num_compressed_partitions(count, config) for count in (seen_before, seen))
        if before == after:
            return keys, values
        first = config.sink_size + before * config.num_kept
        partitions = Partitions.adjacent(first, after - before, config.lag_size, keys.device, number=before)
        kept = fast_select_partitions(keys, values, partitions, config, self.index)
        since = first + (after - before) * config.lag_size
        keys, values = (
            torch.cat([x[:, :, :first], gather_kept(x, kept.flatten(2)), x[:, :, since:]], dim=2)
            for x in (keys, values)
        )
        return keys, values

    @property
    def num_held(self) -> float:
        """Tokens of which it holds keys and values; the mean over rows that differ."""
        if self.row_lengths is not None:
            return mean_of([int(num_held(seen, self.config)) for seen in self.row_lengths])
        return 0 if self.keys is None else self.keys.shape[2]

    def reset(self) -> None:
        super().reset()
        self.row_lengths = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(cast(Any, beam_idx))
        self._choose_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.row_lengths is not None:
            self._choose_rows(torch.arange(len(self.row_lengths)).repeat_interleave(repeats))

    def _choose_rows(self, indices: torch.Tensor) -> None:
        if self.row_lengths is not None:
            self.row_lengths = tuple(torch.tensor(self.row_lengths)[indices.cpu()].tolist())

    def get_seq_length(self) -> int:
        """Columns seen, padding included, as transformers counts them; the cache may hold fewer."""
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


@dataclass(frozen=True)
class _Pass:
    """The forward pass that fills a cache; `rows` is None if no row has padding."""

    rows: Rows | None


class LagKVCache(Cache):
    """For `model.generate(..., past_key_values=cache)`, `lrsa_ds.prefill` and any forward pass.

    After n tokens each layer holds [sink | K kept keys and values of each compressed partition | all tokens since], in
    position order and with their original positions: S + K (floor((n - S) / L) - 1) + L + (n - S) mod L entries for
    n >= S + 2L, and n before.

    The model must be under `apply_lrsa`: new tokens that end a partition and go on into the next have to attend chunk
    by chunk. So a whole prompt may be given at once; `lrsa_ds.prefill` gives it in parts, with bounded memory.

    Prompts of different lengths go in one batch, padded on the left or on the right, with an `attention_mask`: padding
    is neither attended to nor kept, and each row is compressed as if it were alone.

    Args:
        config: sink size, lag size, retention and selection rule, of all layers or of each; `lrsa_ds.new_cache(model)`
            takes those of a model.

    Raises:
        LRSAError: (while in use) another batch size, a model without LRSA attention, or an attempt to crop.
    """

    def __init__(self, config: AnyConfig):
        # Annotated as a class, and called without arguments.
        super().__init__(layer_class_to_replicate=cast(Any, self._next_layer))
        self.config = config
        self._pass: _Pass | None = None  # None between passes

    def begin_pass(self, rows: Rows | None) -> None:
        """Opens the cache for the tokens of one forward pass of a model with LRSA attention."""
        self._pass = _Pass(rows)

    def end_pass(self) -> None:
        """Closes the cache: the next pass may be that of another model."""
        self._pass = None

    def _next_layer(self) -> LagKVLayer:
        index = len(self.layers)
        return LagKVLayer(self.config.at_layer(index), index)

    @classmethod
    def from_dense(cls, cache: Cache, config: AnyConfig) -> "LagKVCache":
        """What is kept of a cache that was filled under dense attention: "prefill fully, then compress"."""
        compressed = cls(config)
        for keys, values in cached_states(cache):
            layer = compressed._next_layer()
            layer.update(keys, values)
            compressed.layers.append(layer)
        return compressed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`; only within a pass that `begin_pass` opened.

        Another attention would attend to the compressed cache as if it held every token.
        """
        if self._pass is None:
            raise LRSAError(
                "a LagKVCache serves models with LRSA attention, and the attention of this one does not know what the "
                "cache holds: call lrsa_ds.apply_lrsa(model, config) first."
            )
        return super().update(key_states, value_states, layer_idx, *args, rows=self._pass.rows, **kwargs)

    @property
    def row_lengths(self) -> tuple[int, ...] | None:
        """Tokens seen of each row, without padding; None if no row had padding."""
        return cast(LagKVLayer, self.layers[0]).row_lengths if self.layers else None

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
        held = [cast(LagKVLayer, layer).num_held for layer in self.layers]
        return mean_of(held) if held else 0


def check_batch(held: int, given: int) -> None:
    """Raises LRSAError if a pass of `given` rows cannot follow the `held` rows of a cache; 0 if it is empty."""
    require(
        held in (0, given),
        f"the cache holds a batch of {held} and was given one of {given}: make a new LagKVCache for another batch, "
        f"or, for {given} beams or samples of it, call cache.batch_repeat_interleave first.",
    )


def cached_states(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values, [B, G, length, D] each, of every layer of a cache that has seen tokens."""
    states = [(layer.keys, layer.values) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [(keys, values) for keys, values in states if keys is not None and values is not None]
