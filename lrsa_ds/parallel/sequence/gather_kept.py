"""LRSA attention of one sequence over several ranks: each rank keeps its queries and receives halos and kept KV.

1. Lag halo: the rank receives the keys and values of the S + 2L tokens before each of its stretches.
2. Selection: it scores, selects and gathers its part of the kept KV, for all KV heads.
3. All-to-all of the kept KV: every rank receives all of it.
4. Attention of its own queries, all heads, over [copies of the kept buffer | halos and stretches].

A sequence is cut into 2P equal stretches. Rank s holds stretch s and stretch 2P - 1 - s: late tokens see more history
than early ones, and this way the queries of all ranks see equally much. The result is that of one rank.

Shapes: H query heads, G KV heads, n tokens of the rank, N of the sequence, M keys beside the history, D head dim, P
ranks.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kernels.blocks import BLOCK
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.kernels.kernel import choose_kernel
from lrsa_ds.attention.partition import cut, intervals_of, partition_table
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.all_to_all import SequenceGroup, start_to_all
from lrsa_ds.parallel.sequence.halo import HaloLayout, halo_layout, with_halos
from lrsa_ds.parallel.sequence.keys_and_values import KeysAndValues
from lrsa_ds.parallel.sequence.pieces import SharedBuffer, halo_size, select_pieces, share_buffer
from lrsa_ds.parallel.sequence.strategy import Sharing, Strategy, check_stretches, local_tokens


def early_and_late(size: int) -> tuple[int, ...]:
    """The rank that holds each stretch: from the first rank to the last, and back."""
    ranks = tuple(range(size))
    return ranks + ranks[::-1]


def check(sharing: Sharing) -> None:
    check_stretches(sharing, GATHER_KEPT)


def kept_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    group: SequenceGroup,
    extras: Extras = PLAIN,
    layer: int = 0,
) -> torch.Tensor:
    """`lrsa_attention` of the whole sequence, for the queries of this rank.

    Args:
        q: [1, H, n, D], of this rank's stretches, one after the other; k, v: [1, G, n, D], of v perhaps another D.
        document_lengths: of the whole sequence, summing to N = P * n.

    Returns:
        [1, H, n, D].
    """
    kernel = choose_kernel(config, q.device, q.dtype, q.shape[3], value_dim=v.shape[3], extras=extras)
    by_blocks = kernel.wants_whole_blocks
    layout = kept_layout(tuple(document_lengths), config, group.size, group.index, by_blocks, q.device)
    k, v = with_halos(k, v, layout.halos, group)
    buffer = layout.buffer
    if any(buffer.num_sent):  # otherwise no document is long enough for a history: attend to the window only
        pair = KeysAndValues.of(k, v)
        both = pair.stack(*select_pieces(k, v, buffer.own, config, layer, fast=not kernel.is_readable))
        shapes = [pair.shape(count) for count in buffer.num_sent]
        history = pair.unstack(buffer.history(start_to_all(group, "kept", both, shapes).finish()))
        k, v = (torch.cat(pieces, dim=2) for pieces in zip(history, (k, v), strict=True))
    return extras.with_sinks(*kernel(q, k, v, layout.intervals, extras))[0]


@dataclass(frozen=True, eq=False)
class KeptLayout:
    """What one rank sends, receives and attends to. Local positions count the M tokens of its halos and stretches."""

    halos: HaloLayout
    buffer: SharedBuffer
    intervals: Intervals  # of each query of this rank, over [copies | halos and stretches]


@lru_cache(maxsize=64)
def kept_layout(
    document_lengths: tuple[int, ...], config: LRSAConfig, size: int, index: int, by_blocks: bool, device: torch.device
) -> KeptLayout:
    """The layout of rank `index` of `size`; `by_blocks`: keys in whole blocks, for a block-sparse kernel."""
    table = partition_table(document_lengths, config, align=BLOCK if by_blocks else 1)
    holders = early_and_late(size)
    mine = local_tokens(holders, table.num_tokens, index)
    length = mine[0].stop - mine[0].start
    halo = halo_size(config, length, by_blocks)
    local = partial(_local_position, stretches=mine, halo=halo)
    # Chunks of the rank's own queries, which count from 0 on; their windows begin at local positions.
    chunks, first_keys = [], [local(part.start, part.start) for part in mine]
    for number, (part, first_key) in enumerate(zip(mine, first_keys, strict=True)):
        to_query, to_key = number * length - part.start, first_key - part.start
        chunks += [
            replace(c, q_lo=c.q_lo + to_query, q_hi=c.q_hi + to_query, win_lo=c.win_lo + to_key)
            for c in cut(table.chunks, part.start, part.stop)
        ]
    chunks, buffer = share_buffer(
        table, chunks, lambda token: holders[token // length], local, size, index, by_blocks, config, device
    )
    hist_lo, hist_hi, win_lo = intervals_of(chunks, device)
    own = torch.cat([torch.arange(key, key + length, dtype=torch.int32, device=device) for key in first_keys])
    window = Intervals(win_lo + buffer.copies.size, own + 1 + buffer.copies.size)
    return KeptLayout(
        halos=halo_layout(holders, table.num_tokens, halo, index),
        buffer=buffer,
        intervals=Intervals(hist_lo, hist_hi, window),
    )


def _local_position(first: int, last: int, stretches: tuple[slice, ...], halo: int) -> int:
    """The local position of token `first` in [halo | stretch] of the stretch that holds token `last` >= `first`.

    `last` is needed because a token may be in one stretch and also in the halo of the other.
    """
    before = 0
    for part in stretches:
        before += halo if part.start else 0
        if part.start <= last < part.stop:
            return before + first - part.start
        before += part.stop - part.start
    raise ValueError(f"token {last} is in none of {stretches}")


GATHER_KEPT = Strategy(name="gather_kept", owners=early_and_late, attend=kept_attention, check=check)
