"""The tokenizer of a run: that of the model, another one, or the embedded byte tokenizer."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lrsa_ds.errors import LRSAError
from lrsa_ds.hub import hub_error, looks_local, resolve_name
from lrsa_ds.settings.model import ModelConfig

Tokenizer = PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of `model.tokenizer`, or else of `model.name`; it always has a padding token.

    Raises:
        LRSAError: it cannot be found or loaded, or it has neither a padding nor an end-of-sequence token.
    """
    if model.tokenizer == "bytes":
        return byte_tokenizer()
    own = model.tokenizer is None
    key, name = ("model.name", model.name) if own else ("model.tokenizer", model.tokenizer)
    # The revision and the GGUF file belong to the repository of the model, not to another tokenizer.
    options = {"revision": model.revision, "gguf_file": model.gguf_file} if own else {}
    options = {option: value for option, value in options.items() if value is not None}
    assert name is not None  # with random weights, the tokenizer is given
    path = resolve_name(key, name)
    gguf_file = options.get("gguf_file")
    if gguf_file is not None and looks_local(name) and not (Path(path) / gguf_file).is_file():
        raise LRSAError(f"model.gguf_file={model.gguf_file!r} is not in model.name={name!r}: give a file of it.")
    try:
        tokenizer = _loader_for(path).from_pretrained(path, trust_remote_code=model.trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise hub_error(key, name, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise LRSAError(f"{key}={name!r} has neither a padding nor an end-of-sequence token: add one to it.")
        # Padding is never a target and is a document of its own, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def decoded(tokenizer: Tokenizer, ids: list[int] | torch.Tensor, **options: Any) -> str:
    """The text of one row of tokens; `options` are those of `Tokenizer.decode`."""
    text = tokenizer.decode(ids, **options)
    assert isinstance(text, str)  # a list is the result for several rows
    return text


def _loader_for(path: str) -> type:
    """The class that reads the tokenizer in a directory as it was saved.

    For some architectures (Qwen2) AutoTokenizer uses the class of the model, whatever the saved settings say, and then
    splits text differently than in training.
    """
    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file() and (Path(path) / "tokenizer.json").is_file():
        named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
        if named == PreTrainedTokenizerFast.__name__:
            return PreTrainedTokenizerFast
    return AutoTokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and three special tokens, with a ChatML template: for tests and random weights."""
    # ByteLevel maps every byte to one printable character; without merges each of them stays a token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
