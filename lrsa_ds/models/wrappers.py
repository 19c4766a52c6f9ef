"""Models that read images or sound beside text (Mistral 3, Qwen2.5-VL): their text model is trained, on text."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lrsa_ds.errors import require
from lrsa_ds.models.parts import decoder_of, reads_encoder

# How the names of inputs begin that are no text.
NOT_TEXT = ("pixel_values", "image_", "video_", "input_features", "input_audio", "audio_", "input_image", "input_modal")


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes models of `config`, with whatever they have beside their text model."""
    kind = config.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def refuse_images(model: PreTrainedModel) -> None:
    """From now on passes of `model` under LRSA take text alone: images and sound raise LRSAError."""
    if _check_text not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_text, with_kwargs=True)


def _check_text(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hook before the forward of a model, around that of its decoder."""
    given = [name for name, value in kwargs.items() if value is not None and name.startswith(NOT_TEXT)]
    require(
        model.config._attn_implementation != "lrsa" or not given,
        f"{', '.join(given)}: {type(model).__name__} reads text alone under LRSA attention: leave images and sound "
        "out, or use dense attention (model.set_attn_implementation('sdpa')).",
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
