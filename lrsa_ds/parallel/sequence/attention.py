"""The attention function of a run: that of one rank, or that of several which share every sequence."""

from functools import partial

import torch

from lrsa_ds.attention import AttentionFunction, layer_attention
from lrsa_ds.attention.extras import Extras, extras_of
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.all_to_all import SequenceGroup
from lrsa_ds.parallel.sequence.halo import halo_attention
from lrsa_ds.parallel.sequence.ulysses import ulysses_attention


def attention_function(group: SequenceGroup | None) -> AttentionFunction:
    """A function with the signature of `lrsa_attention`, for a whole sequence or for this rank's shard of it.

    Under sequence parallelism dense attention (retention 1) is DeepSpeed's Ulysses, LRSA the strategy of the group, and
    layers with a sliding window receive halos.
    """
    return layer_attention if group is None else partial(_shared, group)


def _shared(
    group: SequenceGroup,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LayerSettings,
    document_lengths: tuple[int, ...],
    scale: float | None = None,
    layer: int = 0,
    extras: Extras | None = None,
) -> torch.Tensor:
    extras, is_ulysses = extras_of(scale, extras), isinstance(config, LRSAConfig) and config.is_dense
    if isinstance(config, LRSAConfig):
        attend = ulysses_attention if config.is_dense else group.strategy.attend
        output = attend(q, k, v, config, document_lengths, group, extras, layer)
    else:
        output = halo_attention(q, k, v, config, document_lengths, group, extras)
    group.traffic.count_ulysses(q, k, v, output, group.size, is_real=is_ulysses)
    return output
