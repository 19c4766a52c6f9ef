"""What a kind of layer is: how its attention, its cache and its share of a sequence are computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.layer_settings import LayerSettings, OtherSettings
from lrsa_ds.registry import LAYER_KINDS

# Keys and values [B, G, length, D] each.
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Halo:
    """What a rank needs of a layer in which each token sees a few tokens before itself.

    Args:
        size: from the settings to the most tokens before itself that a token sees.
        intervals: from document lengths, the settings and a device to what each token sees of the whole sequence.
    """

    size: Callable[[Any], int]
    intervals: Callable[[tuple[int, ...], Any, torch.device], Intervals]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerKind:
    """A kind of layer; the settings that the functions take are those of a layer of this kind.

    Args:
        attend: attention of a whole sequence, with the signature of `lrsa_attention`.
        attend_cached: that of new tokens behind a cache, with the signature of `cached_attention`.
        attend_last: the same for the last new token alone: [B, H, 1, D].
        compress: from keys, values, the tokens of the document seen before and now, the settings and the layer to what
            a cache holds of the keys and values, which are what it held before and those of the new tokens.
        num_pairs: from document lengths and the settings to the pairs of a query and a key that it sees.
        layer_type: how `layer_types` in the configuration of a model calls such layers; None: LRSA takes these.
        read: the settings of such a layer, from the configuration of a model.
        halo: how ranks share a sequence in such a layer, under every strategy; None: as the strategy does it.
    """

    attend: Callable[..., torch.Tensor]
    attend_cached: Callable[..., torch.Tensor]
    attend_last: Callable[..., torch.Tensor]
    compress: Callable[..., KeysAndValues]
    num_pairs: Callable[[tuple[int, ...], Any], int]
    layer_type: str | None = None
    read: Callable[[Any], OtherSettings] | None = None
    halo: Halo | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class KeylessKind:
    """A kind of layer without keys and values, and so without attention; see `lrsa_ds.attention.kinds.keyless`.

    Args:
        layers: the settings of such layers, by the types that `layer_types` in the configuration of a model has.
    """

    layers: Mapping[str, OtherSettings]
    halo: None = None

    def num_pairs(self, document_lengths: tuple[int, ...], settings: OtherSettings) -> int:
        return 0


def kind_of(settings: LayerSettings) -> LayerKind:
    """The kind of a layer that has attention."""
    return LAYER_KINDS[settings.kind]


def layer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LayerSettings,
    document_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    layer: int = 0,
    extras: Extras | None = None,
) -> torch.Tensor:
    """`lrsa_attention`, or the attention of a layer of another kind, as the settings say."""
    return kind_of(config).attend(q, k, v, config, document_lengths, scale, layer, extras)
