"""What the attention heads of a model are: their number and dims, and what they do to their scores."""

from typing import Any, NamedTuple, cast

from transformers import PreTrainedConfig, PreTrainedModel

from lrsa_ds.attention.extras import Extras


class HeadDims(NamedTuple):
    """Channels of the queries and keys of a head, and of its values."""

    keys: int
    values: int


def head_dims(config: PreTrainedConfig) -> HeadDims:
    """Those of the layers with full attention, as the attention function sees them."""
    config = _of_full_attention(config)
    if _has_latents(config):  # where `head_dim` is only the part that RoPE turns
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
    else:
        keys = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadDims(keys, getattr(config, "v_head_dim", None) or keys)


def num_kv_heads(config: PreTrainedConfig) -> int:
    """KV heads of the layers with full attention; latent attention makes keys and values for every query head."""
    config = _of_full_attention(config)
    if getattr(config, "multi_query", False):  # GPTBigCode
        return 1
    own = None if _has_latents(config) else getattr(config, "num_key_value_heads", None)
    return own or config.num_attention_heads


def _of_full_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a layer with full attention, where layers have heads of different sizes (Gemma 4)."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    types, each = list(getattr(config, "layer_types", None) or ()), cast(Any, config).per_layer_config
    return each[types.index("full_attention") if "full_attention" in types else 0]


def _has_latents(config: PreTrainedConfig) -> bool:
    return getattr(config, "qk_nope_head_dim", None) is not None


def extras_of_model(model: PreTrainedModel) -> Extras:
    """A cap and sinks as some layer has them, for the choice of a kernel; layers tell their own in each pass."""
    sinks = (getattr(module, "sinks", None) for module in model.modules())
    return Extras(
        softcap=getattr(model.config.get_text_config(), "attn_logit_softcapping", None),
        sinks=next((found for found in sinks if found is not None), None),
    )
