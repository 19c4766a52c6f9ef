"""The layers of a `LagKVCache`: one that grows, and one of fixed storage whose decoding never waits for the host.

Shapes: B rows, G KV heads, D head dim, L lag size, K kept of a partition, C entries of a fixed storage.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicLayer

from lrsa_ds.attention.joining import join
from lrsa_ds.attention.kinds.kind import kind_of
from lrsa_ds.attention.partition import mean_of
from lrsa_ds.attention.ragged import Rows, pack_rows, row_of
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layer_settings import UNLIMITED, LayerSettings


class LagKVLayer(DynamicLayer):
    """The cache of one layer; `keys` and `values` are [B, G, length, D], as `LagKVCache` describes.

    Rows that differ are laid out by `pack_rows`; `row_lengths` are then the tokens seen of each row, without padding.
    """

    is_croppable = False

    def __init__(self, config: LayerSettings, index: int = 0):
        super().__init__()
        self.config, self.index = config, index
        self.cumulative_length = 0  # columns seen: tokens, and padding if rows have any
        self.row_lengths: tuple[int, ...] | None = None  # None if no row has padding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, rows: Rows | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the keys and values of n new tokens; returns those that the new tokens attend to: cached, then new.

        Args:
            rows: the tokens of each row, if rows differ.
        """
        held = 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[0]
        check_batch(held, key_states.shape[0])
        if rows is not None:
            return self._update_rows(key_states, value_states, rows)
        before, after = self.cumulative_length, self.cumulative_length + key_states.shape[2]
        if not before and self.config.num_held(after) < after:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states  # the cache keeps copies of some of them only
        else:
            keys, values = self._joined(key_states, value_states)
        self.cumulative_length = after
        self._hold(*self._compressed(keys, values, before, after))
        return keys, values

    def fill(self, keys: torch.Tensor, values: torch.Tensor, num_seen: int) -> None:
        """Takes what another cache holds after `num_seen` tokens that none of its layers has compressed.

        Raises:
            LRSAError: it holds fewer than a layer of this kind needs.
        """
        needed = self.config.num_held(num_seen) if self.config.room_in_chunk(0) == UNLIMITED else num_seen
        require(
            keys.shape[2] >= needed,
            f"layer {self.index} of the cache holds {keys.shape[2]} of {num_seen} tokens, and {needed} are needed to "
            "compress it: fill one under dense attention, such as lrsa_ds.new_cache(model, {'0-': 1.0}).",
        )
        keys, values = self._joined(keys, values)
        self.cumulative_length = num_seen
        self._hold(*self._compressed(keys, values, 0, num_seen))

    def _joined(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cached keys and values, followed by those of the new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is None or self.values is None or not self.keys.numel():
            return join([key_states]), join([value_states])
        return join([self.keys, key_states]), join([self.values, value_states])

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replaces the keys and values of the cache."""
        self.keys, self.values = keys, values

    def _update_rows(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` of rows that differ: each is compressed when its own tokens complete a partition."""
        entries = rows.entries(self.config)
        if rows.is_unpadded:
            keys, values = self._joined(key_states, value_states)
        else:
            keys, values = self._appended("keys", key_states, rows), self._appended("values", value_states, rows)
        self.cumulative_length += key_states.shape[2]
        self.row_lengths = rows.seen_after
        self._hold_rows(keys, values, entries, rows.seen, rows.seen_after)
        return keys, values

    def _hold_rows(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        entries: Sequence[int],
        seen: Sequence[int],
        after: Sequence[int],
    ) -> None:
        """Compresses and holds rows with these entries, after `seen` tokens before and `after` tokens now."""
        held = [
            self._compressed(row_of(keys, row, length), row_of(values, row, length), *counts)
            for row, (length, *counts) in enumerate(zip(entries, seen, after, strict=True))
        ]
        if all(k.shape[2] == length for (k, _), length in zip(held, entries, strict=True)):
            self._hold(keys, values)
        else:
            self._hold(pack_rows([k for k, _ in held]), pack_rows([v for _, v in held]))

    def _appended(self, name: str, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The keys or values of each row, followed by those of its new tokens: [B, G, longest, D]."""
        if not self.is_initialized:
            self.lazy_initialization(states, states)
        held = getattr(self, name)
        new = [rows.tokens_of(states, row) for row in range(len(rows.seen))]
        if held.numel():
            lengths = [self.config.num_held(seen) for seen in rows.seen]
            new = [torch.cat([row_of(held, r, lengths[r]), new[r]], dim=2) for r in range(len(new))]
        return pack_rows(new)

    @torch.no_grad()
    def _compressed(
        self, keys: torch.Tensor, values: torch.Tensor, seen_before: int, seen: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values after `seen` tokens; the given ones are compressed as after `seen_before` tokens."""
        return kind_of(self.config).compress(keys, values, seen_before, seen, self.config, self.index)

    @property
    def num_held(self) -> float:
        """Entries for each KV head; the mean over rows if they differ."""
        if self.row_lengths is not None:
            return mean_of([self.config.num_held(seen) for seen in self.row_lengths])
        return 0 if self.keys is None else self.keys.shape[2]

    def reset(self) -> None:
        # Not by the base class, which in some versions of transformers keeps the entries and sets them to 0.
        self.keys = self.values = self.row_lengths = None
        self.is_initialized, self.cumulative_length = False, 0

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
        """Columns seen, including padding, as transformers counts them; the cache may hold fewer."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for `query_length` new tokens, as if the first tokens did not exist."""
        held = self.keys.shape[2] if self.is_initialized and self.keys is not None else 0
        return held + query_length, self.cumulative_length - held

    def crop(self, tokens_to_remove: int) -> None:
        raise LRSAError(
            "a LagKVCache cannot be cut back, since it has discarded tokens: copy it (copy.deepcopy) "
            "before tokens that may have to go again; assisted decoding does not work with it."
        )


class FixedLagKVLayer(LagKVLayer):
    """A layer of fixed storage: `most_held` entries, allocated with the first tokens.

    `keys` and `values` are the filled entries of the storage. A step of decoding (see `Step`) writes into the storage
    and attends to all of it. The entries of rows that differ are right-aligned, as in `pack_rows`.

    Args:
        max_tokens: maximum tokens of each row, without padding.
    """

    def __init__(self, config: LayerSettings, max_tokens: int, index: int = 0):
        super().__init__(config, index)
        self.max_tokens = max_tokens
        self.stored_keys: torch.Tensor | None = None  # [B, G, C, D], as are the values
        self.stored_values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, rows: Rows | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `LagKVLayer.update`.

        Raises:
            LRSAError: a row has more than `max_tokens` tokens.
        """
        after = self.cumulative_length + key_states.shape[2] if rows is None else max(rows.seen_after)
        self._check_room(after)
        return super().update(key_states, value_states, *args, rows=rows, **kwargs)

    def fill(self, keys: torch.Tensor, values: torch.Tensor, num_seen: int) -> None:
        self._check_room(num_seen)
        super().fill(keys, values, num_seen)

    def take(self, other: LagKVLayer) -> None:
        """Copies what another layer has seen and holds."""
        assert other.keys is not None and other.values is not None
        self._check_room(max(other.row_lengths or (other.cumulative_length,)))
        self.cumulative_length, self.row_lengths = other.cumulative_length, other.row_lengths
        self.lazy_initialization(other.keys, other.values)
        self._hold(other.keys, other.values)

    def _check_room(self, after: int) -> None:
        require(
            after <= self.max_tokens,
            f"a text of {after} tokens does not fit into a cache of max_tokens={self.max_tokens}: make one with "
            f"max_tokens={after} or more, and room for the answer.",
        )

    def count_tokens(self, count: int) -> None:
        """Counts tokens of each row that steps have stored, of which none but the last completes a partition."""
        keys, values = (x[:, :, : self.num_filled + count] for x in self.storage)
        seen, self.cumulative_length = self.cumulative_length, self.cumulative_length + count
        if self.row_lengths is None:
            self._hold(*self._compressed(keys, values, seen, seen + count))
        else:
            rows, self.row_lengths = self.row_lengths, tuple(length + count for length in self.row_lengths)
            entries = [self.config.num_held(length) + count for length in rows]
            self._hold_rows(keys, values, entries, rows, self.row_lengths)

    @property
    def tokens_to_drop(self) -> int:
        """The number of tokens after which a row drops something for the first time; many if none does."""
        return min(
            _tokens_to_drop(self.config, n, self.max_tokens) for n in set(self.row_lengths or [self.cumulative_length])
        )

    def _compresses(self, num_new: int) -> bool:
        """Whether any row drops something after `num_new` new tokens of each row."""
        return self.tokens_to_drop <= num_new

    @property
    def storage(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, C, D] of a layer that has seen tokens."""
        assert self.stored_keys is not None and self.stored_values is not None
        return self.stored_keys, self.stored_values

    @property
    def num_filled(self) -> int:
        """Filled entries of the storage, the same for all rows, which are right-aligned."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def first_entries(self) -> list[int]:
        """The first filled entry of each row."""
        if self.row_lengths is None:
            return [0] * self.storage[0].shape[0]
        return [self.num_filled - self.config.num_held(seen) for seen in self.row_lengths]

    def _joined(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Works in place unless partitions are completed: the result is attended to after they have been compressed."""
        after = self.num_filled + key_states.shape[2]
        if not self.is_initialized or self._compresses(key_states.shape[2]):
            return super()._joined(key_states, value_states)
        keys, values = (x[:, :, :after] for x in self.storage)
        keys[:, :, self.num_filled :] = key_states.detach()
        values[:, :, self.num_filled :] = value_states.detach()
        return keys, values

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.stored_keys, self.keys = self._stored(keys, self.stored_keys)
        self.stored_values, self.values = self._stored(values, self.stored_values)

    def _stored(self, x: torch.Tensor, storage: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A storage that holds `x`, reused if it fits, and its filled part."""
        size = (*x.shape[:2], self.config.most_held(self.max_tokens), x.shape[3])
        if storage is None or (storage.shape, storage.dtype, storage.device) != (size, x.dtype, x.device):
            storage = x.new_zeros(size)
        filled = storage[:, :, : x.shape[2]]
        if x.data_ptr() != storage.data_ptr():
            filled.copy_(x.detach())
        return storage, filled

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._hold_again()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._hold_again()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._hold_again()

    def _hold_again(self) -> None:
        """Copies the keys and values of rearranged rows back into the storage."""
        if self.keys is not None and self.values is not None:
            self._hold(self.keys, self.values)


@lru_cache(maxsize=1024)
def _tokens_to_drop(config: LayerSettings, seen: int, max_tokens: int) -> int:
    """As `FixedLagKVLayer.tokens_to_drop`, for one row; with these settings 28 layers have one answer."""

    def drops(count: int) -> bool:
        return config.num_held(seen + count) < config.num_held(seen) + count

    counts = range(1, max_tokens - seen + 1)
    place = bisect_left(counts, True, key=drops)
    return counts[place] if place < len(counts) else UNLIMITED


def check_batch(held: int, given: int) -> None:
    """Raises LRSAError if a pass of `given` rows cannot follow a cache of `held` rows; 0 rows: it is empty."""
    require(
        held in (0, given),
        f"the cache holds a batch of {held} and was given one of {given}: make a new LagKVCache for another batch, "
        f"or, for {given} beams or samples of it, call cache.batch_repeat_interleave first.",
    )
