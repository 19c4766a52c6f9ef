"""Halos: each rank receives the keys and values of the tokens before its stretches, from the ranks that hold them.

Layers in which a token sees no more than a few tokens before itself, such as those of a sliding window, need nothing
else, whatever the strategy of the ranks. A halo may be longer than a stretch: it then comes from several ranks.

Shapes: H query heads, G KV heads, n tokens of the rank, M tokens of its halos and stretches, D head dim, P ranks.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kernels.blocks import in_blocks
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.kernels.kernel import choose_kernel
from lrsa_ds.attention.kinds.kind import Halo, kind_of
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.parallel.sequence.all_to_all import SequenceGroup, start
from lrsa_ds.parallel.sequence.keys_and_values import KeysAndValues
from lrsa_ds.parallel.sequence.strategy import local_tokens


def halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LayerSettings,
    document_lengths: tuple[int, ...],
    group: SequenceGroup,
    extras: Extras = PLAIN,
) -> torch.Tensor:
    """`layer_attention` of the whole sequence for the queries of this rank, in a layer whose kind has a halo.

    Args:
        q: [1, H, n, D], of this rank's stretches, one after the other; k, v: [1, G, n, D], of v perhaps another D.
        document_lengths: of the whole sequence, summing to P * n.

    Returns:
        [1, H, n, D].
    """
    halo = kind_of(config).halo
    assert halo is not None, "other layers are shared as the strategy does it"
    kernel = choose_kernel(config, q.device, q.dtype, q.shape[3], value_dim=v.shape[3], extras=extras)
    size = in_blocks(halo.size(config)) if kernel.wants_whole_blocks else halo.size(config)
    layout = halo_layout(group.strategy.owners(group.size), q.shape[2] * group.size, size, group.index)
    k, v = with_halos(k, v, layout, group)
    intervals = _local_intervals(tuple(document_lengths), config, halo, layout, q.device)
    return extras.with_sinks(*kernel(q, k, v, intervals, extras))[0]


@dataclass(frozen=True, eq=False)
class HaloLayout:
    """What one rank sends and receives. Local tokens are those of its stretches, one after the other.

    Args:
        stretches: the tokens of each of its stretches.
        begins: the first token of the halo of each.
        sent: for each rank, the local tokens that it needs.
        num_received: tokens from each rank.
        pieces: for each stretch its halo: ranks, and slices of what they send.
    """

    stretches: tuple[slice, ...]
    begins: tuple[int, ...]
    sent: tuple[tuple[slice, ...], ...]
    num_received: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, slice], ...], ...]


@lru_cache(maxsize=64)
def halo_layout(owners: tuple[int, ...], num_tokens: int, halo: int, index: int) -> HaloLayout:
    """The layout of rank `index`.

    Args:
        owners: the rank that holds each stretch, in the order of the tokens.
        halo: tokens before each stretch; fewer where the sequence begins.
    """
    length, size = num_tokens // len(owners), max(owners) + 1
    sent: list[list[slice]] = [[] for _ in range(size)]
    num_received, pieces = [0] * size, {}
    mine = [stretch for stretch, owner in enumerate(owners) if owner == index]
    for stretch, owner in enumerate(owners):
        begin = max(0, stretch * length - halo)
        for other in range(begin // length, stretch):
            lo, hi = max(begin, other * length) - other * length, length
            if owners[other] == index:
                first = mine.index(other) * length
                sent[owner].append(slice(first + lo, first + hi))
            if owner == index:
                sender = owners[other]
                place = num_received[sender]
                pieces.setdefault(stretch, []).append((sender, slice(place, place + hi - lo)))
                num_received[sender] += hi - lo
    stretches = local_tokens(owners, num_tokens, index)
    return HaloLayout(
        stretches=stretches,
        begins=tuple(max(0, part.start - halo) for part in stretches),
        sent=tuple(map(tuple, sent)),
        num_received=tuple(num_received),
        pieces=tuple(tuple(pieces.get(stretch, ())) for stretch in mine),
    )


def with_halos(
    k: torch.Tensor, v: torch.Tensor, layout: HaloLayout, group: SequenceGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """[halo | stretch] of each stretch, one after the other: two [1, G, M, D], with gradients to the halos' owners."""
    pair = KeysAndValues.of(k, v)
    both = pair.stack(k, v)
    # Empty parts are slices too, so that every rank has the all-to-all in its graph and joins its backward pass.
    parts = [torch.cat([both[:, :, :0], *(both[:, :, part] for part in parts)], dim=2) for parts in layout.sent]
    shapes = [pair.shape(count) for count in layout.num_received]
    received = start(group, "halo", parts, shapes).finish()
    # A rank that receives nothing reads an empty slice, for the same reason.
    local = [received[group.index][:, :, :0]]
    for stretch, pieces in zip(both.split(both.shape[2] // len(layout.stretches), dim=2), layout.pieces, strict=True):
        local += [*(received[sender][:, :, part] for sender, part in pieces), stretch]
    return pair.unstack(torch.cat(local, dim=2))


@lru_cache(maxsize=64)
def _local_intervals(
    document_lengths: tuple[int, ...], config: LayerSettings, halo: Halo, layout: HaloLayout, device: torch.device
) -> Intervals:
    """What each query of a rank sees of the tokens of its halos and stretches."""
    whole = halo.intervals(document_lengths, config, device)
    ends, place = [], 0
    for part, begin in zip(layout.stretches, layout.begins, strict=True):
        ends.append([x[part] - begin + place for x in (whole.lo, whole.hi)])
        place += part.stop - begin
    lo, hi = (torch.cat(x) for x in zip(*ends, strict=True))
    return Intervals(lo, hi)
