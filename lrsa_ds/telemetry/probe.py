"""Attention that also measures what a compressed cache would take from the answers.

Shapes: H query heads, G KV heads, N tokens, D head dim, n queries of an answer, m keys up to its last query.
"""

from collections.abc import Sequence

import torch

from lrsa_ds.attention import layer_attention
from lrsa_ds.attention.extras import Extras, extras_of
from lrsa_ds.attention.kept_buffer import buffer_positions
from lrsa_ds.attention.partition import PartitionTable, partition_table
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.layers import OfLRSA
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.telemetry.answers import Answer

# Maximum elements of a tensor of attention scores or probabilities, in fp32: 64 MB.
PROBABILITIES_AT_ONCE = 2**24


class RetentionProbe:
    """`layer_attention` that also sums what `compressed` would drop at given answers, for each KV head.

    Layers that LRSA does not replace drop nothing, and are left out.

    Attributes:
        answers: of the one row of the next pass; set them before it.
        sums: by layer, fp64 [2 G + 1] on the CPU, over all passes. First the attention mass on tokens that the cache
            would have dropped: the mean over the query heads of a KV head, summed over the answer tokens. Then the kept
            share of the tokens that spell an answer and have left the window when it begins, summed over the answers
            that have such tokens. Last, the number of these answers.

    Args:
        compressed: the cache; the pass itself uses its own settings.
    """

    def __init__(self, compressed: OfLRSA):
        self.compressed = compressed
        self.answers: Sequence[Answer] = ()
        self.sums: dict[int, torch.Tensor] = {}

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: LayerSettings,
        document_lengths: Sequence[int] | None = None,
        scale: float | None = None,
        layer: int = 0,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        """As `lrsa_attention`, for one row: q [1, H, N, D], k and v [1, G, N, D]."""
        lengths = (q.shape[2],) if document_lengths is None else tuple(document_lengths)
        extras = extras_of(scale, extras)
        if isinstance(config, LRSAConfig):
            self._observe(q, k, v, partition_table(lengths, self.compressed.at_layer(layer)), extras, layer)
        return layer_attention(q, k, v, config, document_lengths, layer=layer, extras=extras)

    @torch.no_grad()
    def _observe(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: PartitionTable, extras: Extras, layer: int
    ) -> None:
        kept_GN = _kept(k, v, table, layer)
        win_lo = table.intervals()[2]
        win_lo_N = win_lo.to(k.device)
        mass, kept = (torch.zeros(k.shape[1], dtype=torch.float64, device=k.device) for _ in range(2))
        num_left = 0
        for answer in self.answers:
            mass += _dropped_mass(q[0], k[0], kept_GN, win_lo_N, answer, extras)
            window, behind_sink = int(win_lo[answer.first]), answer.start + table.sink_size
            left = [place for place in answer.places if behind_sink <= place < window]
            if left:
                kept += kept_GN[:, left].double().mean(dim=1)
                num_left += 1
        self.sums[layer] = self.sums.get(layer, 0) + torch.cat([mass, kept, mass.new_tensor([num_left])]).cpu()


def _kept(k: torch.Tensor, v: torch.Tensor, table: PartitionTable, layer: int) -> torch.Tensor:
    """Which tokens are in the kept buffer: bool [G, N]."""
    kept = torch.zeros(k.shape[1:3], dtype=torch.bool, device=k.device)
    return kept.scatter_(1, buffer_positions(k, v, table, layer)[0], True)


def _dropped_mass(
    q_HND: torch.Tensor,
    k_GND: torch.Tensor,
    kept_GN: torch.Tensor,
    win_lo_N: torch.Tensor,
    answer: Answer,
    extras: Extras,
) -> torch.Tensor:
    """Mass of dense attention on tokens neither kept nor in the window, summed over the answer's queries: [G]."""
    group_size, num_keys = len(q_HND) // len(k_GND), answer.end - answer.start
    at_once = max(1, PROBABILITIES_AT_ONCE // (group_size * num_keys))
    positions = torch.arange(answer.start, answer.end, device=q_HND.device)
    mass = torch.zeros(len(k_GND), dtype=torch.float64, device=q_HND.device)
    for queries in torch.arange(answer.first, answer.end, device=q_HND.device).split(at_once):
        is_later = positions > queries[:, None]
        is_outside = positions < win_lo_N[queries][:, None]
        for head, (keys, kept) in enumerate(zip(k_GND, kept_GN, strict=True)):
            group = q_HND[head * group_size : (head + 1) * group_size, queries]
            with torch.autocast(q_HND.device.type, enabled=False):  # in fp32, whatever the dtype of the pass
                scores = extras.scale_of(q_HND.shape[2]) * group.float() @ keys[answer.start : answer.end].float().T
            scores = extras.capped(scores).masked_fill_(is_later, -torch.inf)
            own = extras.of_heads(slice(head * group_size, (head + 1) * group_size))
            probabilities, _ = own.with_sinks(scores.softmax(dim=-1), scores.logsumexp(dim=-1))
            is_dropped = is_outside & ~kept[answer.start : answer.end]
            mass[head] += (probabilities * is_dropped).sum(dtype=torch.float64) / group_size
    return mass
