"""Which tokens of a stretch stay where an example is too long: its beginning, its end, and the answer's place."""


def kept_parts(num_tokens: int, room: int, spared: range | None = None) -> list[range]:
    """The parts of a stretch of `num_tokens` tokens that stay, at most `room` tokens in all, in order.

    As much of the beginning as of the end stays. Where that would take tokens of `spared`, the place of an answer, the
    place stays too, with what stands around it: a third of the room each for beginning, place and end.

    Args:
        num_tokens: tokens of the stretch.
        room: tokens that may stay, fewer than `num_tokens`; all of them are used.
        spared: the tokens of the place. One that is longer than `room` cannot be spared, and is cut like the rest.
    """
    if room >= num_tokens:
        return [range(num_tokens)]
    head, tail = range((room + 1) // 2), range(num_tokens - room // 2, num_tokens)
    if spared is None or len(spared) > room or _covers([head, tail], spared):
        return [part for part in (head, tail) if part]
    size = max(len(spared), room // 3)
    start = spared.start - (size - len(spared)) // 2
    rest = room - size
    # At either end, the window takes the place of the beginning or the end, and what is left goes to the other one.
    start = min(max(start, 0), num_tokens - size)
    num_head = min((rest + 1) // 2, start)
    num_tail = min(rest - num_head, num_tokens - start - size)
    num_head = rest - num_tail
    return _joined([range(num_head), range(start, start + size), range(num_tokens - num_tail, num_tokens)])


def is_spared(parts: list[range], place: range) -> bool:
    """Whether the tokens of `place` all stay, side by side."""
    return _covers(parts, place)


def _covers(parts: list[range], place: range) -> bool:
    return any(part.start <= place.start and place.stop <= part.stop for part in parts)


def _joined(parts: list[range]) -> list[range]:
    """The parts in order, those that touch as one."""
    joined: list[range] = []
    for part in parts:
        if joined and part.start <= joined[-1].stop and part:
            part = range(joined.pop().start, part.stop)
        if part:
            joined.append(part)
    return joined
