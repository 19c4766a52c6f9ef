"""From hidden states to logits, as in the model's own forward pass: the output layer, then scales and a cap."""

import torch
from transformers import PreTrainedModel

from lrsa_ds.errors import LRSAError
from lrsa_ds.models.parts import decoder_of, holds

# Settings of transformers, grouped by their effect on the logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISOR = "logits_scaling"  # Granite
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # model types in which this setting is a factor
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma; RecurrentGemma
# What the forward pass of some models does, but `logits_of` does not.
NOT_DONE = {
    "logits_mup_width_multiplier": "divides the hidden states before the output layer",
    "unpadded_vocab_size": "cuts its logits after the output layer",
}


def output_layer(model: PreTrainedModel) -> torch.nn.Module:
    """The matrix that makes logits, without what surrounds it in `logits_of`."""
    head = model.get_output_embeddings()
    if head is None:
        raise LRSAError(f"{type(model).__name__} has no output layer: a causal language model is needed.")
    return head


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """The module that takes hidden states and makes logits: the output layer in most models, more in BERT."""
    layer, decoder = output_layer(model), decoder_of(model)
    if any(child is layer for child in model.children()):
        return layer
    part: torch.nn.Module = model
    while part is model or holds(part, decoder):
        part = next((child for child in part.children() if holds(child, layer)), layer)
    return part


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] of hidden states [..., C], in fp32, equal to those of the model's own forward pass.

    A cap c turns logits into c tanh(logits / c).
    """
    config = model.config.get_text_config()
    logits = output_head(model)(hidden).float()
    for key in MULTIPLIERS:
        if (factor := getattr(config, key, None)) is not None:
            logits = logits * factor
    if (factor := getattr(config, DIVISOR, None)) is not None:
        logits = logits * factor if config.model_type in MULTIPLIES_BY_DIVISOR else logits / factor
    for key in CAPS:
        if (cap := getattr(config, key, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def other_logits(model: PreTrainedModel) -> str | None:
    """What the forward pass does around its output layer that `logits_of` does not; None if nothing."""
    config = model.config.get_text_config()
    parts = decoder_of(model), output_layer(model)
    for name, child in model.named_children():
        if not any(holds(child, part) for part in parts) and any(True for _ in child.parameters()):
            return f"has {name} beside its decoder and its output layer"
    given = {key: getattr(config, key, None) for key in NOT_DONE}
    return next((f"{NOT_DONE[key]} ({key}={value})" for key, value in given.items() if value not in (None, 1)), None)
