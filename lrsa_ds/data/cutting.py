"""Which tokens of a stretch stay where an example is too long: its beginning, its end, and the answer's place."""

from collections.abc import Sequence

import numpy as np

from lrsa_ds.errors import LRSAError


class TooLong(LRSAError):
    """A row has more tokens than an example may have, and `data.too_long` does not let it be cut."""

    @classmethod
    def of(cls, num_tokens: int, seq_len: int) -> "TooLong":
        return cls(
            f"it has {num_tokens:,} tokens, more than seq_len={seq_len}, and data.too_long does not let it be cut: "
            "raise seq_len, or set data.too_long to cut or drop."
        )


def kept_parts(num_tokens: int, room: int, spared: Sequence[range] = ()) -> list[range]:
    """The parts of a stretch of `num_tokens` tokens that stay, `room` tokens in all, in order.

    As much of the beginning as of the end stays. Where that would take tokens of a place in `spared`, all these places
    stay too, with what stands around them: a third of the room, if they need less than that.

    Args:
        num_tokens: tokens of the stretch.
        room: tokens that may stay, at most `num_tokens`.
        spared: places of answers. One for which the others leave no room is cut like the rest.
    """
    keep = np.zeros(num_tokens, dtype=bool)
    _fill_from_ends(keep, room)
    if any(not keep[place.start : place.stop].all() for place in spared):
        keep[:] = False
        for place in spared:
            _mark(keep, place, room)
        margin = max(0, room // 3 - int(keep.sum())) // (2 * len(spared))
        for place in spared:
            _mark(keep, range(max(0, place.start - margin), min(num_tokens, place.stop + margin)), room)
        _fill_from_ends(keep, room)
    borders = np.flatnonzero(np.diff(keep, prepend=False, append=False))
    return [range(int(start), int(stop)) for start, stop in zip(borders[::2], borders[1::2], strict=True)]


def _mark(keep: np.ndarray, place: range, room: int) -> None:
    """Keeps a place too, if the room allows it."""
    if keep.sum() + np.count_nonzero(~keep[place.start : place.stop]) <= room:
        keep[place.start : place.stop] = True


def _fill_from_ends(keep: np.ndarray, room: int) -> None:
    """Keeps as many of the first as of the last tokens that are not kept yet, until there is no room."""
    others, left = np.flatnonzero(~keep), room - int(keep.sum())
    keep[others[: (left + 1) // 2]] = True
    keep[others[len(others) - left // 2 :]] = True


def is_spared(parts: list[range], place: range) -> bool:
    """Whether the tokens of `place` all stay, side by side."""
    return any(part.start <= place.start and place.stop <= part.stop for part in parts)
