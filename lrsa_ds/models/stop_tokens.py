"""Stop tokens: training teaches the model to end answers with them, so generation has to stop at them."""

from typing import cast

from transformers import PreTrainedModel

from lrsa_ds.data.special import SpecialTokens
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.data.turns import ChatTemplate
from lrsa_ds.models.generation import end_tokens
from lrsa_ds.settings.model import ModelConfig


def trained_stop_tokens(tokenizer: Tokenizer, chat_template: bool = True) -> list[int]:
    """The tokens that end an answer in training: the tokenizer's own, and those with which its template ends a turn."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if chat_template and tokenizer.chat_template is not None:
        found = ChatTemplate(tokenizer, SpecialTokens(tokenizer)).end_tokens()
        ends += cast(list[int], tokenizer.convert_tokens_to_ids(found))
    return sorted(set(ends))


def set_stop_tokens(
    model: PreTrainedModel, tokenizer: Tokenizer, source: ModelConfig, chat_template: bool = True
) -> None:
    """Adds `trained_stop_tokens` to the generation settings of `model`, which are exported with it.

    Existing stop tokens are kept, unless they belong to another tokenizer, as with random weights.
    """
    settings = model.generation_config
    if source.random is not None or source.tokenizer is not None:
        settings.eos_token_id, settings.bos_token_id = None, tokenizer.bos_token_id
    ends = {*end_tokens(model, tokenizer), *trained_stop_tokens(tokenizer, chat_template)}
    settings.eos_token_id = sorted(ends) or None
    settings._from_model_config = (
        False  # else older versions of transformers read the stop tokens of the model's config
    )
