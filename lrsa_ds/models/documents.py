"""The documents of a forward pass, read from the inputs that packing collators pass to a model.

There are four such inputs, alone or together: `position_ids` that restart, `cu_seq_lens_q` and `cu_seq_lens_k`
(cumulative lengths), `seq_idx` (a document number for each token), and an attention mask of document numbers
(1 1 1 2 2 0: zeros are padding). Shapes: R rows, N tokens of a row.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lrsa_ds.errors import LRSAError, require

# How the names of the cumulative lengths begin, in all spellings in use.
CUMULATIVE = "cu_seq"


def document_lengths(inputs: Mapping[str, Any], num_rows: int, num_tokens: int) -> tuple[int, ...] | None:
    """Tokens of each document, in order; None if every row is one document, with or without padding on its right.

    Args:
        inputs: keyword arguments of the pass; those that do not describe documents are ignored. The mask is 2D.

    Returns:
        The lengths sum to N if they are the same in every row, else to R * N: those of the first row, then of the
        second, and so on. Padding on the right of packed documents is a document of its own.

    Raises:
        LRSAError: there is padding on the left or between the tokens of a document, a document is in several pieces,
            positions jump, or two inputs disagree.
    """
    inputs = {name: torch.as_tensor(x).cpu() for name, x in inputs.items() if _is_read(name) and x is not None}
    if not inputs:
        return None
    bounds = _cumulative(inputs, num_rows * num_tokens)
    real = _real_tokens(inputs.get("attention_mask"), bounds, num_rows, num_tokens)
    found = _document_starts(inputs, bounds, real)
    if not found:
        return None
    (first_name, starts), *others = found.items()
    for name, other in others:
        require(torch.equal(other, starts), f"{first_name} and {name} describe different documents: give one of them.")
    require(
        inputs.get("position_ids") is None or "position_ids" in found or int(starts.sum()) == num_rows,
        f"position_ids run on from one document of {first_name} to the next: leave them out, or restart them in each.",
    )
    # Padding is all that follows the last real token.
    starts = starts | (~real & real.roll(1, dims=1))
    if starts.sum() == num_rows:
        return None
    edges = [torch.cat([row.nonzero()[:, 0], torch.tensor([num_tokens])]).diff().tolist() for row in starts]
    rows = edges[:1] if all(row == edges[0] for row in edges) else edges
    return tuple(length for row in rows for length in row)


def restarting_positions(lengths: tuple[int, ...], num_tokens: int) -> torch.Tensor:
    """Positions that start at 0 in every document: [1, N], or [R, N] for documents of several rows."""
    return torch.cat([torch.arange(length) for length in lengths]).view(-1, num_tokens)


def _is_read(name: str) -> bool:
    return name in ("attention_mask", "position_ids", "seq_idx") or name.startswith(CUMULATIVE)


def _cumulative(inputs: Mapping[str, torch.Tensor], num_all: int) -> list[int] | None:
    """The cumulative lengths without empty documents; None if the inputs have none."""
    given = {name: x for name, x in inputs.items() if name.startswith(CUMULATIVE)}
    if not given:
        return None
    (first_name, bounds), *others = ((name, sorted(set(x.tolist()))) for name, x in given.items())
    for name, other in others:
        require(other == bounds, f"{first_name} and {name} describe different documents: give one of them.")
    ascends = given[first_name].diff().ge(0).all()
    require(
        len(bounds) > 1 and bounds[0] == 0 and bounds[-1] <= num_all and bool(ascends),
        f"{first_name}={given[first_name].tolist()} is not valid: give 0 and the tokens up to each document's end, in "
        f"ascending order, at most {num_all}.",
    )
    return bounds


def _real_tokens(mask: torch.Tensor | None, bounds: list[int] | None, num_rows: int, num_tokens: int) -> torch.Tensor:
    """Which tokens are not padding, [R, N]: in each row, all up to the last one that mask and lengths cover."""
    real = torch.ones(num_rows, num_tokens, dtype=torch.bool)
    if bounds is not None:
        real = (torch.arange(num_rows * num_tokens) < bounds[-1]).view(num_rows, num_tokens)
        require(bool(real[:, 0].all()), f"{CUMULATIVE}_lens end at {bounds[-1]} and leave a row without tokens.")
    if mask is None:
        return real
    require(
        mask.shape == (num_rows, num_tokens),
        f"attention_mask {list(mask.shape)} does not fit the {num_rows} x {num_tokens} tokens of the pass.",
    )
    require(bool((mask >= 0).all()), "attention_mask has negative values: give 0 for padding and 1 for tokens.")
    seen = mask != 0
    require(
        bool(seen[:, 0].all()),
        "the attention mask begins with padding, which would be taken for the sink of the document: "
        "pad on the right (tokenizer.padding_side='right').",
    )
    up_to_last = seen.flip(1).cumsum(1).flip(1) > 0
    require(
        bool((mask > 1).any()) or torch.equal(up_to_last, seen),
        "the attention mask has padding between tokens, which LRSA would take for tokens of the document: "
        "pad on the right (tokenizer.padding_side='right').",
    )
    return real & up_to_last


def _document_starts(
    inputs: Mapping[str, torch.Tensor], bounds: list[int] | None, real: torch.Tensor
) -> dict[str, torch.Tensor]:
    """For each input that describes documents, the tokens at which a document starts, [R, N]."""
    found = {}
    if bounds is not None:
        starts = torch.zeros(real.numel(), dtype=torch.bool)
        starts[[bound for bound in bounds if bound < real.numel()]] = True
        starts = starts.view_as(real)
        require(bool(starts[:, 0].all()), f"{CUMULATIVE}_lens describe a document that continues in the next row.")
        found[f"{CUMULATIVE}_lens"] = starts & real
    if (numbers := inputs.get("seq_idx")) is not None:
        found["seq_idx"] = _changes("seq_idx", numbers, real, least=0)
    if (mask := inputs.get("attention_mask")) is not None and bool((mask > 1).any()):
        found["attention_mask"] = _changes("attention_mask", mask, real, least=1)
    if (positions := inputs.get("position_ids")) is not None:
        restarts = _restarts(positions, real)
        if restarts.sum() > len(real):  # without restarts, positions may not know of documents
            found["position_ids"] = restarts
    return found


def _as_rows(name: str, values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    values = values[None] if values.ndim == 1 else values
    require(
        values.ndim == 2 and values.shape[1] == real.shape[1] and values.shape[0] in (1, len(real)),
        f"{name} {list(values.shape)} does not fit the {len(real)} x {real.shape[1]} tokens of the pass.",
    )
    return values.expand(len(real), -1)


def _changes(name: str, numbers: torch.Tensor, real: torch.Tensor, least: int) -> torch.Tensor:
    """Where the document number changes; numbers below `least` are padding and may be repeated."""
    numbers = _as_rows(name, numbers, real)
    starts = torch.ones_like(real)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts &= real
    for row, begins in zip(numbers, starts, strict=True):
        named = row[begins & (row >= least)]
        require(
            len(named.unique()) == len(named),
            f"{name} has a document in several pieces: its tokens must be contiguous, without padding between them.",
        )
    return starts


def _restarts(positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Where positions do not increase by one: there they must restart, as at the first token of the row."""
    positions = _as_rows("position_ids", positions, real)
    starts = torch.ones_like(real)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts &= real
    jumps = (starts & (positions != positions[:, :1])).nonzero()
    if len(jumps):
        row, token = jumps[0].tolist()
        before, after = positions[row, token - 1 : token + 1].tolist()
        raise LRSAError(
            f"position_ids go from {before} to {after} at token {token} of row {row}: within a document they increase "
            f"by one, and the next one starts again at {positions[row, 0]}; give document_lengths for other positions."
        )
    return starts
