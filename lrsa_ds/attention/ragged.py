"""Attention of a batch whose rows are at different positions, such as prompts of different lengths.

Each row has its own partition grid. Keys and values of all rows are in one tensor, right-aligned, so that the next
token of every row is appended in the same column.

Shapes: B rows, H query heads, G KV heads, n columns of the pass, D head dim, A entries of the longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from lrsa_ds.attention.decoding import attend_entries
from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kinds.kind import KeysAndValues, kind_of
from lrsa_ds.attention.lrsa import in_one_dtype
from lrsa_ds.layer_settings import LayerSettings


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a pass: how many tokens each has seen, and where its new tokens are.

    Args:
        seen: tokens of each row before the pass, without padding.
        places: for each row, the columns of the pass with its tokens, int64, ascending; other columns are padding.
        num_columns: n.
    """

    seen: tuple[int, ...]
    places: tuple[torch.Tensor, ...]
    num_columns: int

    @classmethod
    def of_mask(cls, seen: Sequence[int], is_token: torch.Tensor) -> "Rows":
        """The rows of a pass whose tokens are marked in `is_token`, bool [B, n]."""
        return cls(tuple(seen), tuple(row.nonzero()[:, 0] for row in is_token), is_token.shape[1])

    @property
    def seen_after(self) -> tuple[int, ...]:
        """Tokens of each row after the pass."""
        return tuple(seen + len(places) for seen, places in zip(self.seen, self.places, strict=True))

    @property
    def is_unpadded(self) -> bool:
        return all(len(places) == self.num_columns for places in self.places)

    def tokens_of(self, x: torch.Tensor, row: int) -> torch.Tensor:
        """The tokens of one row of x [B, heads, n, D]: [1, heads, tokens, D]."""
        return x[row : row + 1].index_select(2, self.places[row].to(x.device))

    def entries(self, config: LayerSettings) -> list[int]:
        """Keys that the last token of each row may see: the entries of the cache and the new tokens."""
        return [config.num_held(seen) + len(places) for seen, places in zip(self.seen, self.places, strict=True)]


def pack_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Packs rows [1, G, length, D] into one tensor [B, G, A, D], right-aligned, with zeros before each."""
    longest = max(row.shape[2] for row in rows)
    return torch.cat([pad(row, (0, 0, longest - row.shape[2], 0)) for row in rows])


def row_of(x: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """One row of a tensor from `pack_rows`: [1, G, length, D]."""
    return x[row : row + 1, :, x.shape[2] - length :]


def attention_behind(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    rows: Rows | None,
    config: LayerSettings,
    extras: Extras,
    layer: int,
    held: KeysAndValues | None,
    only_last: bool = False,
) -> torch.Tensor:
    """Attention of new tokens behind a cache: `ragged_attention` if rows differ, else that of the kind of the layer.

    Args:
        q: queries of all new tokens, or of the last ones, where a model computes no others.
        only_last: whether the output of the last token is all that is needed, and the others may be zeros; not where
            rows differ.
    """
    num_queries = q.shape[2]
    num_new = k.shape[2] - config.num_held(num_seen) if rows is None else rows.num_columns
    if num_queries < num_new:  # where chunks end depends on the number of new tokens
        only_last = num_queries == 1 and rows is None
        q = pad(q, (0, 0, num_new - num_queries, 0))
        return attention_behind(q, k, v, num_seen, rows, config, extras, layer, held, only_last)[:, :, -num_queries:]
    if rows is not None:
        return ragged_attention(q, k, v, rows, config, extras, layer, held)
    given = q, k, v, num_seen, config, extras, layer, held
    if not only_last:
        return kind_of(config).attend_cached(*given)
    return pad(kind_of(config).attend_last(*given), (0, 0, q.shape[2] - 1, 0))


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    config: LayerSettings,
    extras: Extras = PLAIN,
    layer: int = 0,
    held: KeysAndValues | None = None,
) -> torch.Tensor:
    """`attend_cached` of the kind of the layer, of each row by itself.

    Args:
        q: queries of the new columns, [B, H, n, D].
        k, v: [B, G, A, D], right-aligned: for each row the entries of `LagKVCache` and its new tokens.
        held: the entries after the pass, right-aligned too, if the caller has them.

    Returns:
        [B, H, n, D]; zeros in padding.
    """
    q, k, v = in_one_dtype(q, k, v)
    entries = rows.entries(config)
    if rows.num_columns == 1 and rows.is_unpadded:
        last = k.shape[2] - 1
        first, last = (torch.tensor(x, device=q.device) for x in ([last + 1 - count for count in entries], [last]))
        return attend_entries(q, k, v, first, last, extras)
    output, own = q.new_zeros(*q.shape[:3], v.shape[3]), None
    for row, (seen, places, length) in enumerate(zip(rows.seen, rows.places, entries, strict=True)):
        if not len(places):
            continue
        queries, keys, values = rows.tokens_of(q, row), row_of(k, row, length), row_of(v, row, length)
        if held is not None:
            mine = config.num_held(seen + len(places))
            own = row_of(held[0], row, mine), row_of(held[1], row, mine)
        found = kind_of(config).attend_cached(queries, keys, values, seen, config, extras, layer, own)
        output[row].index_copy_(1, places.to(q.device), found[0])
    return output
