"""Which layers of a model LRSA replaces, and what in its structure prevents that."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lrsa_ds.attention.kinds.kind import KeylessKind
from lrsa_ds.layer_ranges import said_of_others
from lrsa_ds.layer_settings import ModelLayers, OtherSettings, SharedKeys
from lrsa_ds.models.keywords import lost_keywords
from lrsa_ds.models.parts import decoder_of
from lrsa_ds.models.recurrent import recurrent_modules
from lrsa_ds.models.shared_keys import sources_of
from lrsa_ds.notices import say_once
from lrsa_ds.registry import LAYER_KINDS

# Attributes that mark other kinds of attention -> what they do; without them, these would pass as plain attention.
KINDS = {
    "lambda_q1": "subtracts two attentions (differential attention), and LRSA is one",
    "conv_idx": "keeps several states of short convolutions beside its attention",
    "num_fwd_mem_blocks": "is shared by several layers",
    "prepare_dynamic_mask": "makes its own mask from its values (dynamic mask attention)",
}

# As `layer_types` of transformers calls layers; "hybrid" ones have both a recurrence and full attention, which LRSA
# takes.
FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
HYBRID = "hybrid"
CARRY_A_STATE = (LINEAR, "conv", HYBRID)
# The same in `layers_block_type` of older versions.
FORMERLY = {"attention": FULL, "mamba": LINEAR, "recurrent": LINEAR}


def layers_of(config: PreTrainedConfig) -> ModelLayers:
    """The layers of a model, from its configuration; `unknown_type` tells whether all are known."""
    text, known = config.get_text_config(), _kinds()
    readers = [known.get(layer_type) for layer_type in _layer_types(text)]
    others = [None if read is None else read(text) for read in readers]
    for layer, source in sources_of(text).items():
        others[layer] = SharedKeys(source=source)
    return ModelLayers(tuple(others))


def unknown_type(config: PreTrainedConfig, layer: int) -> str | None:
    """The type of a layer that is neither full attention nor in the table of kinds, or None."""
    if layer in (getattr(config, "cross_attention_layers", None) or ()):  # of images (Mllama); text passes them by
        return "cross_attention"
    layer_type = _layer_types(config)[layer]
    return None if layer_type == FULL or layer_type in _kinds() else layer_type


def nothing_to_take(config: PreTrainedConfig) -> str | None:
    """Why LRSA has no layer to take in a model, or None."""
    layers = layers_of(config)
    if layers.taken:
        return None
    said = f"has no layer of full attention, the only kind that LRSA takes: {said_of_others(layers)}"
    if not any(other is not None and other.has_keys for other in layers.others):
        return said
    return (
        f"{said}; where the model is to have full attention, set sliding_window to null in its config.json or in "
        "model.random"
    )


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """The type of each layer; what is local within as many tokens as the model has positions hides nothing."""
    positions = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    spans = {SLIDING: window, CHUNKED: getattr(config, "attention_chunk_size", None)}
    whole = [kind for kind, span in spans.items() if not span or (positions is not None and span >= positions)]
    num_layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers  # there, those of the encoder
    types = _named_types(config) or [SLIDING] * num_layers
    return [FULL if layer_type in (HYBRID, *whole) else layer_type for layer_type in types]


def _named_types(config: PreTrainedConfig) -> list[str] | None:
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return types and [FORMERLY.get(layer_type, layer_type) for layer_type in types]


def _kinds() -> dict[str, Callable[[Any], OtherSettings]]:
    """How the settings of layers that stay what they are are read, by the types of transformers."""
    found: dict[str, Callable[[Any], OtherSettings]] = {}
    for kind in (LAYER_KINDS[name] for name in LAYER_KINDS):
        if isinstance(kind, KeylessKind):
            found |= {layer_type: lambda _, own=own: own for layer_type, own in kind.layers.items()}
        elif kind.layer_type is not None:
            found[kind.layer_type] = kind.read
    return found


def other_attention(module: nn.Module) -> str | None:
    """What an attention layer does that LRSA does not; None if nothing."""
    return next((reason for name, reason in KINDS.items() if hasattr(module, name)), None)


def unfit_decoder(model: PreTrainedModel) -> str | None:
    """Why documents, caches and ranks cannot be passed through the decoder of `model`; None if they can."""
    decoder = decoder_of(model)
    if not isinstance(decoder, PreTrainedModel) or decoder.get_output_embeddings() is not None:
        return f"gives {type(decoder).__name__} as its decoder, which is none that ends before the output layer"
    recurrent = {module.layer_idx for module in recurrent_modules(decoder)}
    for layer, layer_type in enumerate(_named_types(decoder.config) or ()):
        if layer_type in CARRY_A_STATE and layer not in recurrent:
            return f"keeps the state of layer {layer} ({layer_type}) elsewhere than in a cache of transformers"
    known, modules = sources_of(decoder.config), cast(Iterator[Any], decoder.modules())
    if any(getattr(m, "is_kv_shared_layer", False) and m.layer_idx not in known for m in modules):
        return "has layers that attend to the keys and values of another model"
    return lost_keywords(decoder)


def without_dropout(model: PreTrainedModel) -> None:
    """Sets attention dropout to 0 in the settings of the model, and prints it once: LRSA drops no attention weights."""
    config = model.config.get_text_config()
    for key in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if value := getattr(config, key, 0.0):
            say_once(f"{key}={value} of the model is set to 0: LRSA drops no attention weights.")
            setattr(config, key, 0.0)
