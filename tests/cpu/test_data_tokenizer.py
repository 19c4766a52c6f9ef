"""The embedded tokenizer, and one sentence for every tokenizer that cannot be had."""

import pytest
from transformers import AutoTokenizer

from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.hub import hub_error
from lrsa_ds.settings.model import ModelConfig
from tests.chat_tokenizers import tokenizer_of

BYTES = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")


def test_bytes_round_trip_save_and_reload(tmp_path):
    tokenizer = load_tokenizer(BYTES)
    assert len(tokenizer) == 259 and tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|im_end|>"
    text = "héllo\n  <|im_start|>user\n\x00中<|im_end|>"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.replace("<|im_start|>", "").replace("<|im_end|>", "").encode()) + 2
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(ModelConfig(name=str(tmp_path))), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(text).input_ids == ids and again.pad_token_id == tokenizer.pad_token_id
        assert again.chat_template == tokenizer.chat_template


def test_padding_falls_back_to_the_end_token(tmp_path):
    tokenizer = load_tokenizer(BYTES)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_neither_padding_nor_end_token(tmp_path):
    tokenizer = load_tokenizer(BYTES)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LRSAError, match="has neither a padding nor an end-of-sequence token"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "./missing"}, "model.name='./missing' does not exist"),
        ({"name": "~/missing_dir"}, "model.name='/.*/missing_dir' does not exist"),
        ({"name": "some/model", "tokenizer": "/a/b/c"}, "model.tokenizer='/a/b/c' does not exist"),
        ({"name": "some/model"}, "model.name='some/model' is not on this machine and the hub cannot be reached: set"),
        ({"name": "not a name"}, "model.name='not a name' is neither a directory here nor on the hub, or private"),
        ({"name": "{tmp}"}, "model.name='.*' cannot be loaded"),
        ({"name": "{tmp}", "gguf_file": "x.gguf"}, "model.gguf_file='x.gguf' is not in model.name"),
    ],
)
def test_one_sentence_for_what_cannot_be_loaded(tmp_path, model, sentence):
    model = {key: value.replace("{tmp}", str(tmp_path)) for key, value in model.items()}
    with pytest.raises(LRSAError, match=sentence) as caught:
        load_tokenizer(ModelConfig(**model))
    assert "\n" not in str(caught.value)


def test_hub_error_for_a_data_set_names_its_own_way_out():
    error = hub_error("data.name", "a/b", ConnectionError("Couldn't reach 'a/b' on the Hub"))
    assert str(error) == (
        "data.name='a/b' is not on this machine and the hub cannot be reached: "
        "use data=files with data.path set to local JSONL or Parquet files."
    )


def test_a_saved_tokenizer_splits_as_before_beside_any_model(tmp_path):
    tokenizer = tokenizer_of("byte level")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    text = "It is 345.\n\nParis"
    ids = tokenizer(text).input_ids
    assert load_tokenizer(ModelConfig(name=str(tmp_path)))(text).input_ids == ids
