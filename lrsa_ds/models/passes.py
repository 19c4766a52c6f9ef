"""The inputs of a forward pass that describe its tokens: their documents, padding and positions.

The decoder reads them before every pass, so that all callers are checked alike: a user's own training loop, `prefill`,
`generate`, and direct calls of the decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lrsa_ds.attention import AttentionFunction
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.ragged import Rows
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.cache_layers import check_batch
from lrsa_ds.models.documents import document_lengths, restarting_positions


def read_pass(inputs: dict[str, Any], new_cache: Callable[[], LagKVCache]) -> dict[str, Any]:
    """The keyword arguments of a pass, converted for LRSA: with the lengths of packed documents and without a mask.

    Args:
        inputs: keyword arguments of the decoder.
        new_cache: creates the cache of a pass with `use_cache=True` that was given none.

    Raises:
        LRSAError: there are no tokens, or mask, positions or documents are not supported.
    """
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None:
        return inputs
    num_rows, num_tokens = tokens.shape[:2]
    if (positions := inputs.get("position_ids")) is not None and positions.ndim == 3:
        inputs = inputs | {"position_ids": _of_text(positions)}
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping) and not any(value is not None for value in mask.values()):
        # A model around the decoder has asked for a mask of each kind of layer, and there is none.
        inputs, mask = inputs | {"attention_mask": None}, None
    require(
        mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2),
        "LRSA attention makes its own mask: a 4D attention_mask is not supported.",
    )
    cache = inputs.get("past_key_values")
    num_seen = 0 if cache is None else cache.get_seq_length()
    require(
        num_rows > 0 and num_tokens > 0,
        f"a pass over input_ids {[num_rows, num_tokens]} after {num_seen} seen tokens has no tokens: give at least one "
        "in each row, such as tokenizer.bos_token_id; `generate` takes the complete text, not only its new tokens.",
    )
    if cache is None and inputs.get("use_cache"):
        cache = new_cache()
    if isinstance(cache, LagKVCache):
        rows = read_rows(mask, cache, num_rows, num_tokens)
        if rows is None:
            check_follows(inputs, num_seen, num_rows, num_tokens)
            if inputs.get("position_ids") is None:  # some models would count each pass from 0
                positions = torch.arange(num_seen, num_seen + num_tokens, device=tokens.device)
                inputs = inputs | {"position_ids": positions[None]}
        else:
            _check_one_document({name: x for name, x in inputs.items() if name != "position_ids"}, num_rows, num_tokens)
            inputs |= {"rows": rows, "position_ids": _positions_of(rows, inputs).to(tokens.device)}
        return inputs | {"attention_mask": None, "past_key_values": cache}
    if num_seen:
        return inputs  # the attention function raises the error
    lengths = inputs.get("document_lengths")
    if lengths is None:
        lengths = document_lengths(inputs, num_rows, num_tokens)
    else:  # the other inputs may be those of a shard
        document_lengths({"attention_mask": mask}, num_rows, num_tokens)
    positions = inputs.get("position_ids")
    if lengths is not None and positions is None:  # selection depends on them: use those of inference
        _check_sum(lengths, num_rows, num_tokens)
        positions = restarting_positions(lengths, num_tokens).to(tokens.device)
    return inputs | {"attention_mask": None, "document_lengths": lengths, "position_ids": positions}


def _of_text(positions: torch.Tensor) -> torch.Tensor:
    """The positions [B, N] of text in a model that gives each token a time, a height and a width, [3 or 4, B, N]."""
    require(
        bool((positions == positions[:1]).all()),
        f"position_ids {list(positions.shape)} give tokens a time, a height and a width that differ, as those of "
        "images do: LRSA attention reads text alone.",
    )
    return positions[0]


def is_under_lrsa(inputs: Mapping[str, Any]) -> bool:
    """Whether the keywords of a pass, or of a part of it, are those of one under LRSA."""
    return "lrsa_config" in inputs or inputs.get("step") is not None


def _check_sum(lengths: Sequence[int], num_rows: int, num_tokens: int) -> None:
    require(
        sum(lengths) in (num_tokens, num_rows * num_tokens),
        f"document_lengths sum to {sum(lengths)}, and there are {num_tokens} tokens in each of {num_rows} rows.",
    )


def check_follows(inputs: dict[str, Any], num_seen: int, num_rows: int, num_tokens: int) -> None:
    """Raises LRSAError unless the tokens of a pass are the next tokens of the one document that the cache has seen."""
    positions, total = inputs.get("position_ids"), num_seen + num_tokens
    positions = None if positions is None else positions.cpu()
    _check_one_document(inputs | {"position_ids": positions}, num_rows, num_tokens)
    if positions is not None and not bool((positions == torch.arange(num_seen, total)).all()):
        first, last = positions.flatten()[[0, -1]].tolist()
        raise LRSAError(
            f"the tokens of the pass have position_ids {first} to {last}, and the cache has seen {num_seen} tokens, so "
            f"they are at {num_seen} to {total - 1}: give `generate` the complete text and a cache that has not seen "
            "its last token, as after lrsa_ds.prefill(model, ids[:, :-1], cache), and another text another cache."
        )


def _check_one_document(inputs: dict[str, Any], num_rows: int, num_tokens: int) -> None:
    """Raises LRSAError if a pass with a cache has several documents."""
    if num_tokens > 1:
        told = {name: x for name, x in inputs.items() if name != "attention_mask"}
        given = inputs.get("document_lengths") or document_lengths(told, num_rows, num_tokens) or (num_tokens,)
        require(
            len(given) == 1,
            f"a cache holds one document in each row, and the pass has documents of {given} tokens: give one, or "
            "use_cache=False in training.",
        )


def read_rows(mask: torch.Tensor | None, cache: LagKVCache, num_rows: int, num_tokens: int) -> Rows | None:
    """The tokens of each row of a pass with `cache`; None if there is and was no padding.

    Args:
        mask: of all columns, seen and new: 1 for tokens, 0 for padding. Without it, all new columns are tokens.

    Raises:
        LRSAError: the mask has another shape, numbers documents, or differs from the one used to fill the cache.
    """
    num_seen, seen = cache.get_seq_length(), cache.row_lengths
    check_batch(len(seen or ()), num_rows)
    if mask is None:
        is_token = torch.ones(num_rows, num_tokens, dtype=torch.bool)
        return None if seen is None else Rows.of_mask(seen, is_token)
    total = num_seen + num_tokens
    require(
        mask.shape == (num_rows, total),
        f"attention_mask {list(mask.shape)} does not fit: the cache has seen {num_seen} tokens and the pass has "
        f"{num_tokens}, in {num_rows} rows; give one of {[num_rows, total]}, or none.",
    )
    mask = mask.cpu()
    require(
        bool(((mask == 0) | (mask == 1)).all()),
        "with a cache, the attention mask has 1 for tokens and 0 for padding, and no other values.",
    )
    if seen is None and bool((mask == 1).all()):
        return None
    before = (num_seen,) * num_rows if seen is None else seen
    told = tuple(mask[:, :num_seen].sum(1).long().tolist())
    require(
        told == before,
        f"the attention mask counts {list(told)} tokens of the rows as seen, and the cache has seen {list(before)}: "
        "it cannot drop tokens as padding later; make a new cache and give it the complete text with this mask.",
    )
    return Rows.of_mask(before, mask[:, num_seen:] == 1)


def _positions_of(rows: Rows, inputs: dict[str, Any]) -> torch.Tensor:
    """Positions of the tokens in their rows, int64 [B, n]; 0 for padding.

    Raises:
        LRSAError: the pass has other position_ids.
    """
    given = inputs.get("position_ids")
    given = None if given is None else given.cpu().expand(len(rows.seen), -1)
    positions = torch.zeros(len(rows.seen), rows.num_columns, dtype=torch.int64)
    for row, (seen, places) in enumerate(zip(rows.seen, rows.places, strict=True)):
        positions[row, places] = torch.arange(seen, seen + len(places))
        require(
            given is None or torch.equal(given[row, places], positions[row, places]),
            f"the position_ids of row {row} do not continue after the {seen} tokens that the cache has seen: leave "
            "them out, or count the tokens of each row without padding.",
        )
    return positions


def attend_rows(
    attend: AttentionFunction,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LayerSettings,
    lengths: tuple[int, ...] | None,
    extras: Extras,
    layer: int,
) -> torch.Tensor:
    """`attend`, also for documents that differ between rows: these rows are packed into one sequence.

    Args:
        q: [B, H, N, D]; k, v: [B, G, N, D]; D of v may differ.
        lengths: of the documents of every row, summing to N, or of all rows in order, summing to B * N.
    """
    num_rows, num_heads, num_tokens = q.shape[:3]
    if num_rows == 1 or lengths is None or sum(lengths) != num_rows * num_tokens:
        return attend(q, k, v, config, lengths, layer=layer, extras=extras)
    q, k, v = (x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[3]) for x in (q, k, v))
    output = attend(q, k, v, config, lengths, layer=layer, extras=extras)
    return output.view(num_heads, num_rows, num_tokens, v.shape[3]).transpose(0, 1)
