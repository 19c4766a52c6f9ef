"""Which tokens stay when a text is cut: those at its beginning, at its end, and around the answer."""

from collections.abc import Sequence

import numpy as np

from lrsa_ds.errors import LRSAError


class TooLong(LRSAError):
    """A row has more tokens than an example may have, and `data.too_long` does not allow cutting it."""

    @classmethod
    def of(cls, num_tokens: int, seq_len: int) -> "TooLong":
        return cls(
            f"it has {num_tokens:,} tokens, more than seq_len={seq_len}, and data.too_long does not let it be cut: "
            "raise seq_len, or set data.too_long to cut or drop."
        )


def kept_parts(num_tokens: int, room: int, spared: Sequence[range] = ()) -> list[range]:
    """The parts of `num_tokens` tokens that stay, `room` tokens in total, in order.

    The beginning and the end keep equally many tokens. If that would remove tokens of a place in `spared`, all these
    places stay as well, with the text around them: up to a third of the room in total.

    Args:
        num_tokens: tokens before cutting.
        room: tokens that may stay, at most `num_tokens`.
        spared: places of answers. A place for which the others leave no room is cut like other text.
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
    """Also keeps a place, if there is room for it."""
    if keep.sum() + np.count_nonzero(~keep[place.start : place.stop]) <= room:
        keep[place.start : place.stop] = True


def _fill_from_ends(keep: np.ndarray, room: int) -> None:
    """Keeps more tokens until there is no room: as many from the beginning as from the end."""
    others, left = np.flatnonzero(~keep), room - int(keep.sum())
    keep[others[: (left + 1) // 2]] = True
    keep[others[len(others) - left // 2 :]] = True


def is_spared(parts: list[range], place: range) -> bool:
    """Whether all tokens of `place` stay, contiguously."""
    return any(part.start <= place.start and place.stop <= part.stop for part in parts)
