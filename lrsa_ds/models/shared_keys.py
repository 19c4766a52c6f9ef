"""Layers that attend to the keys and values of an earlier layer (Gemma 3n, Gemma 4 E2B and E4B).

transformers gives such a layer what its source has attended to: in training the keys and values of all tokens, behind a
cache those that it holds and those of the new tokens. LRSA selects among them as the source does, by the settings of
the source, so both attend to the same kept KV. The cache holds them once, with the source.
"""

from typing import Any

from transformers import PreTrainedConfig


def sources_of(config: PreTrainedConfig) -> dict[int, int]:
    """The layers that have no keys and values of their own, and the layer whose keys and values each attends to.

    These are the last `num_kv_shared_layers`, and the last layer of their type before them.
    """
    types = getattr(config, "layer_types", None) or ()
    first = len(types) - (getattr(config, "num_kv_shared_layers", None) or 0)
    last = {layer_type: layer for layer, layer_type in enumerate(types[:first])}
    return {layer: last[types[layer]] for layer in range(first, len(types)) if types[layer] in last}


def through_all_layers(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a decoder that passes all tokens through all layers, for a pass without a cache.

    Gemma 4 drops tokens without logits before its layers that share keys and values. Behind a cache the attention does
    with their last queries; one of a whole sequence takes as many queries as keys. The model chooses logits later.
    """
    return inputs | {"logits_to_keep": 0} if "logits_to_keep" in inputs else inputs
