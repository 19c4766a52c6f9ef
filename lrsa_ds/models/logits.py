"""From hidden states to logits, as the model's own forward pass makes them: the output layer, then scales and a cap."""

import torch
from transformers import PreTrainedModel

from lrsa_ds.errors import LRSAError

# Settings of transformers, by what they do with the logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISOR = "logits_scaling"  # Granite
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # model types that give the same name to a factor
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma; RecurrentGemma
# What the forward pass of some models does, and `logits_of` does not.
NOT_DONE = {
    "logits_mup_width_multiplier": "divides the hidden states before the output layer",
    "unpadded_vocab_size": "cuts its logits after the output layer",
}


def output_layer(model: PreTrainedModel) -> torch.nn.Module:
    """The layer from hidden states to logits, before scales and caps: `logits_of` applies them."""
    head = model.get_output_embeddings()
    if head is None:
        raise LRSAError(f"{type(model).__name__} has no output layer: a causal language model is needed.")
    return head


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] of hidden states [..., C], in fp32, as the model's own forward pass gives them.

    A cap c makes c tanh(logits / c) of the logits.
    """
    config = model.config.get_text_config()
    logits = output_layer(model)(hidden).float()
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
    """What the forward pass of a model does around its output layer that `logits_of` does not, or None."""
    config = model.config.get_text_config()
    given = {key: getattr(config, key, None) for key in NOT_DONE}
    return next((f"{NOT_DONE[key]} ({key}={value})" for key, value in given.items() if value not in (None, 1)), None)
