"""Parts of a model's structure that prevent LRSA from replacing its attention."""

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lrsa_ds.notices import say_once

# Attributes that mark other kinds of attention -> what they do; without them, these would pass as plain attention.
KINDS = {
    "expand_kv": "caches a latent from which the keys and values of every head are made, and LRSA keeps single keys",
    "lambda_q1": "subtracts two attentions (differential attention), and LRSA is one",
    "prepare_dynamic_mask": "makes its own mask from its values (dynamic mask attention)",
}


def other_attention(module: nn.Module) -> str | None:
    """What an attention layer does that LRSA does not; None if nothing."""
    return next((reason for name, reason in KINDS.items() if hasattr(module, name)), None)


def unfit_decoder(model: PreTrainedModel) -> str | None:
    """Why documents, caches and ranks cannot be passed through the decoder of `model`; None if they can."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder.get_output_embeddings() is not None:
        return f"gives {type(decoder).__name__} as its decoder, which is none that ends before the output layer"
    others = set(getattr(decoder.config, "layers_block_type", None) or ()) - {"attention", "full_attention"}
    if others:
        return f"has layers of type {', '.join(sorted(others))}, whose state is carried from token to token"
    for kind in {type(m) for m in decoder.modules() if type(m).__name__ in (model._no_split_modules or ())}:
        if issubclass(kind, GradientCheckpointingLayer) and not _hands_on_keywords(kind):
            return f"does not pass keywords to its attention (the forward of {kind.__name__} drops **kwargs)"
    return None


def without_dropout(model: PreTrainedModel) -> None:
    """Sets attention dropout to 0 in the settings of the model, and prints it once: LRSA drops no attention weights."""
    config = model.config.get_text_config()
    for key in ("attention_dropout", "attn_pdrop"):
        if value := getattr(config, key, 0.0):
            say_once(f"{key}={value} of the model is set to 0: LRSA drops no attention weights.")
            setattr(config, key, 0.0)


def _hands_on_keywords(kind: type[nn.Module]) -> bool:
    """Whether a call in the forward of a layer passes `**kwargs` on; True if there is no source to read."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):
        return True
    return any(keyword.arg is None for call in _calls(ast.parse(source)) for keyword in call.keywords)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))
