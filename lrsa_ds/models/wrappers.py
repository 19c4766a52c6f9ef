"""Models that read images or sound beside text (Gemma 3, Mistral 3): their text model is trained, on text."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lrsa_ds.errors import require
from lrsa_ds.models.parts import decoder_of, reads_encoder


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes models of `config`, with whatever they have beside their text model."""
    kind = config.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def check_positions(model: PreTrainedModel) -> None:
    """Raises LRSAError if a model gives its tokens other positions than single numbers (Qwen2.5-VL)."""
    require(
        not any(hasattr(module, "get_rope_index") for module in model.modules()),
        f"{type(model).__name__} gives each token a time, a height and a width in the place of one position, which "
        "LRSA does not support: use a model that only reads text, or one with single positions, such as mistral3.",
    )


def freeze_encoders(model: PreTrainedModel) -> None:
    """Excludes what text never reaches from training, in place: weight decay would shrink it.

    That is all but the text model, the embeddings and the output layer.
    """
    parts = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    named = [found for part in parts if part is not None for found in part.named_parameters()]
    used = {parameter for name, parameter in named if not reads_encoder(name)}
    for parameter in model.parameters():
        if parameter not in used:
            parameter.requires_grad = False
