"""`generate` and its callers on a model under `apply_lrsa`: which cache is filled, and what is refused."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, pipeline

from launch.chat import Reader
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, prefill
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.evaluator import Evaluator, Mode, Sample
from lrsa_ds.models.generation import end_tokens
from tests.cpu.test_model import tiny

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
GREEDY = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)


@pytest.fixture
def model():
    return apply_lrsa(tiny("llama", vocab_size=300), CONFIG)


@pytest.fixture
def ids():
    return torch.randint(1, 101, (1, 45))


def behind(model, ids):
    cache = LagKVCache(CONFIG)
    prefill(model, ids, cache)
    return cache


def greedy(model, ids):
    """The likeliest tokens, each from a training pass over all that precede it."""
    for _ in range(10):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 7}, {"num_return_sequences": 1}])
def test_without_a_cache_the_right_one_is_made(model, ids, options):
    found = model.generate(ids, return_dict_in_generate=True, **GREEDY, **options)
    assert torch.equal(found.sequences, greedy(model, ids))
    if options.get("use_cache", True):
        assert isinstance(found.past_key_values, LagKVCache) and found.past_key_values.num_held < 30


def test_a_pass_that_fills_a_cache_fills_the_right_one(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, LagKVCache) and cache.get_seq_length() == 45
    after = model(ids[:, :1], past_key_values=cache).logits[:, -1]
    expected = model(torch.cat([ids, ids[:, :1]], dim=1), use_cache=False).logits[:, -1]
    assert (after - expected).abs().max() <= 1e-4


def test_dense_attention_has_its_own_cache_again(model, ids):
    model.set_attn_implementation("sdpa")
    found = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert type(found.past_key_values) is DynamicCache


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_generate(model, ids, copied):
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(copied(model).generate(ids, past_key_values=LagKVCache(CONFIG), **GREEDY), expected)
    assert torch.equal(copy.deepcopy(model).generate(ids, **GREEDY), expected)


def test_text_generation_pipeline(model):
    prompt = "A text of some sixty bytes, which is more than S + 2L of them."
    ask = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    (answer,) = ask(prompt, max_new_tokens=5, do_sample=False, return_tensors=True)
    ids = byte_tokenizer()(prompt, return_tensors="pt").input_ids
    assert answer["generated_token_ids"] == greedy(model, ids)[0, : ids.shape[1] + 5].tolist()


@pytest.mark.parametrize("prefilled", [False, True])
def test_several_samples(model, ids, prefilled):
    cache = behind(model, ids[:, :-1]) if prefilled else None
    options = dict(max_new_tokens=10, do_sample=True, num_return_sequences=3, pad_token_id=0)
    found = model.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options)
    assert found.sequences.shape == (3, 55)
    expected = model(found.sequences, use_cache=False).logits[:, 44:-1]
    assert (torch.stack(found.logits, dim=1) - expected).abs().max() <= 1e-4


def test_beams_of_several_prompts_behind_a_prefilled_cache(model):
    ids = torch.randint(1, 101, (2, 45))
    expected = model.generate(ids, num_beams=2, **GREEDY)
    found = model.generate(ids, past_key_values=behind(model, ids[:, :-1]), num_beams=2, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_seen", [45, 50])
def test_a_cache_that_has_seen_all_is_refused(model, ids, num_seen):
    cache = behind(model, torch.cat([ids, ids[:, : num_seen - 45]], dim=1))
    said = rf"cache has seen {num_seen} tokens.*prefill\(model, ids\[:, :-1\], cache\)"
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(LRSAError, match=said):
            model.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)


def test_the_tokens_since_the_cache_with_the_mask_of_all(model, ids):
    mask = torch.ones_like(ids)
    found = model.generate(ids[:, 40:], attention_mask=mask, past_key_values=behind(model, ids[:, :40]), **GREEDY)
    assert torch.equal(found, greedy(model, ids)[:, 40:])
    with pytest.raises(LRSAError, match=r"attention_mask \[1, 44\] does not fit: the cache has seen 40.* \[1, 45\]"):
        model(ids[:, 40:], attention_mask=mask[:, :44], past_key_values=behind(model, ids[:, :40]))


def test_only_the_tokens_since_the_cache_without_a_mask_are_refused(model, ids):
    for num_seen in (20, 40):  # transformers would take the last tokens of ids for all of the text
        with pytest.raises(LRSAError, match=r"cache has seen 20 tokens|after 40 seen tokens has no tokens"):
            model.generate(ids[:, 30:], past_key_values=behind(model, ids[:, :num_seen]), **GREEDY)


def test_embeddings_in_the_place_of_tokens(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    expected = greedy(model, ids)[:, 45:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected)
    cache = behind(model, ids[:, :-1])
    assert torch.equal(model.generate(inputs_embeds=embeddings, past_key_values=cache, **GREEDY), expected)


def test_an_empty_prompt_is_refused(model, ids):
    for call in (lambda: model.generate(ids[:, :0], **GREEDY), lambda: model(ids[:, :0]), lambda: model(ids[:0])):
        with pytest.raises(LRSAError, match="after 0 seen tokens has no tokens: give at least one"):
            call()


@pytest.mark.parametrize(
    "options,said",
    [
        (dict(prompt_lookup_num_tokens=3), "assisted decoding takes tokens back"),
        (dict(assistant_model="itself"), "assisted decoding takes tokens back"),
        (dict(cache_implementation="quantized"), "cache_implementation='quantized' is not a cache"),
        (dict(past_key_values="dense"), r"got one of 45 tokens: use past_key_values=lrsa_ds.LagKVCache"),
    ],
)
def test_what_cannot_be_honoured_is_refused(model, ids, options, said):
    if "assistant_model" in options:
        options = dict(assistant_model=copy.deepcopy(model))
    if "past_key_values" in options:
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        options, ids = dict(past_key_values=cache), torch.cat([ids, ids[:, :1]], dim=1)
    with pytest.raises(LRSAError, match=said):
        model.generate(ids, **GREEDY, **options)


def test_generation_stops_at_every_end_token(model):
    model.generation_config.eos_token_id = [7, 299]
    assert end_tokens(model, byte_tokenizer()) == [7, byte_tokenizer().eos_token_id, 299]
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, byte_tokenizer()) == [7, byte_tokenizer().eos_token_id]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, byte_tokenizer()) == [byte_tokenizer().eos_token_id]


def test_evaluation_and_chat_stop_at_every_end_token(tmp_path, model, ids):
    """Whatever the model says ends its turn here, so that one token is all that is said."""
    model.generation_config.eos_token_id = list(range(300))
    model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    said = []
    evaluator = Evaluator(model, byte_tokenizer(), CONFIG, lambda name, text, answers: said.append(text) or 0.0)
    sample = Sample("task", 0, 45, tuple(ids[0].tolist()), ("x",), ("exact",), max_new_tokens=10)
    evaluator.rows(sample, [Mode("chunked", 0.3)])
    reader = Reader(str(tmp_path), "A text that is long enough to be compressed.")
    said.append(reader.answer("What?", max_new_tokens=10))
    assert len(said) == 2 and all(len(text) <= 1 for text in said)
