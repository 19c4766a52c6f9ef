"""Prompts of different lengths in one batch: each row is what it would be alone."""

import copy

import pytest
import torch
from transformers import pipeline

from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.partition import num_held
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.registry import SELECTION_RULES
from tests.cpu.test_model import tiny

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
LENGTHS = (61, 40, 9, 1)
GREEDY = dict(max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=-1)


def make(family="llama", config=CONFIG, layers=None, **settings):
    return apply_lrsa(tiny(family, **settings), config, layers)


def prompts(lengths=LENGTHS):
    return [torch.randint(1, 101, (length,)) for length in lengths]


def padded(rows, side="left"):
    """Tokens and mask, [B, longest] each."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(ids.shape[1] - len(tokens), None) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def assert_rows_are_those_alone(model, rows, side, chunks_at_once=1):
    """Prefill of the batch, then 20 tokens behind it, against a training pass over each row alone."""
    cache, (ids, mask) = new_cache(model), padded(rows, side)
    found = [prefill(model, ids, cache, chunks_at_once, attention_mask=mask)]
    following = torch.randint(1, 101, (len(rows), 20))
    with torch.no_grad():
        found += [model(column, past_key_values=cache).logits[:, -1] for column in following.split(1, dim=1)]
        for row, tokens in enumerate(rows):
            whole = torch.cat([tokens, following[row]])[None]
            expected = model(whole, use_cache=False).logits[0, len(tokens) - 1 :]
            assert (torch.stack(found, dim=1)[row] - expected).abs().max() <= 1e-4
    assert cache.row_lengths == tuple(len(tokens) + 20 for tokens in rows)
    return cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunks_at_once", [1, 3, 10])
def test_prefill_and_decoding(side, kv_heads, chunks_at_once):
    model = make("qwen2", num_key_value_heads=kv_heads)
    cache = assert_rows_are_those_alone(model, prompts(), side, chunks_at_once)
    assert cache.num_held == sum(num_held(length + 20, CONFIG) for length in LENGTHS) / len(LENGTHS)


@pytest.mark.parametrize("selection", sorted(set(SELECTION_RULES)))
def test_every_selection_rule(selection):
    config = LRSAConfig(sink_size=3, lag_size=8, retention=0.3, selection=selection)
    assert_rows_are_those_alone(make("qwen3", config), prompts(), "left")


def test_layers_with_settings_of_their_own():
    layers = {
        0: LRSAConfig(sink_size=3, lag_size=8, retention=1.0),
        1: LRSAConfig(sink_size=3, lag_size=8, retention=0.3),
    }
    for side in ("left", "right"):
        assert_rows_are_those_alone(make("llama", layers=layers), prompts(), side)


def test_any_steps():
    """Padding where a row has no token yet, and passes that begin and end anywhere."""
    model, rows, cache = make(), prompts(), LagKVCache(CONFIG)
    ids, mask = padded(rows)
    found, done = [], 0
    for step in (1, 13, 2, 1, 30, 14):
        part, seen = ids[:, done : done + step], mask[:, : done + step]
        found.append(model(part, attention_mask=seen, past_key_values=cache).logits)
        done += step
    for row, tokens in enumerate(rows):
        expected = model(tokens[None], use_cache=False).logits[0]
        assert (torch.cat(found, dim=1)[row, -len(tokens) :] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "prefill_chunk_size": 7}])
def test_answers(options):
    model, rows = make(), prompts()
    ids, mask = padded(rows)
    together = model.generate(ids, attention_mask=mask, **GREEDY | options)
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens[None], **GREEDY | options)[0, len(tokens) :]
        assert torch.equal(together[row, ids.shape[1] :], alone)


def test_rows_that_end_early():
    model, rows = make(), prompts()
    ids, mask = padded(rows)
    free = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    options = GREEDY | dict(eos_token_id=int(free[1, 3]))
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens[None], **options)[0, len(tokens) :]
        assert torch.equal(together[row, : len(alone)], alone) and not together[row, len(alone) :].any()


def test_several_turns_with_padding_between_them():
    model, rows, cache = make(), prompts(), LagKVCache(CONFIG)
    ids, mask = padded(rows)
    for turn in ((5, 17, 1, 9), (12, 1, 3, 30)):
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        mask = torch.cat([mask, torch.ones(len(rows), 14, dtype=torch.int64)], dim=1)
        more, its_mask = padded(prompts(turn))
        ids, mask = torch.cat([ids, more], dim=1), torch.cat([mask, its_mask], dim=1)
    seen = cache.get_seq_length()
    logits = prefill(model, ids[:, seen:], cache, attention_mask=mask[:, seen:])
    for row in range(len(rows)):
        expected = model(ids[row, mask[row] == 1][None], use_cache=False).logits[0, -1]
        assert (logits[row] - expected).abs().max() <= 1e-4


def test_samples_and_beams_behind_a_prefilled_cache():
    model, rows = make(), prompts()
    ids, mask = padded(rows)
    options = GREEDY | dict(num_beams=2)
    expected = model.generate(ids, attention_mask=mask, **options)
    cache = LagKVCache(CONFIG)
    rest = mask[:, :-1].any(1)  # a row needs a token before the last
    prefill(model, ids[rest, :-1], cache, attention_mask=mask[rest, :-1])
    found = model.generate(ids[rest], attention_mask=mask[rest], past_key_values=copy.deepcopy(cache), **options)
    assert torch.equal(found, expected[rest])
    chosen = torch.tensor([2, 0])
    cache.batch_select_indices(chosen)
    found = model.generate(ids[chosen], attention_mask=mask[chosen], past_key_values=cache, **options)
    assert torch.equal(found, expected[chosen])


def test_a_cache_may_be_emptied_and_used_for_other_rows():
    model, cache = make(), LagKVCache(CONFIG)
    ids, mask = padded(prompts())
    prefill(model, ids, cache, attention_mask=mask)
    cache.reset()
    assert cache.row_lengths is None and cache.get_seq_length() == 0
    other = torch.randint(1, 101, (1, 30))
    assert (prefill(model, other, cache) - model(other, use_cache=False).logits[:, -1]).abs().max() <= 1e-4


def test_text_generation_pipeline_in_batches():
    model, tokenizer = make(vocab_size=300), byte_tokenizer()
    tokenizer.padding_side = "left"
    texts = ["Short.", "A text of some sixty bytes, which is more than S + 2L of them."]
    options = dict(max_new_tokens=6, do_sample=False, return_tensors=True)
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    together = ask(texts, batch_size=2, **options)
    for text, (answer,) in zip(texts, together, strict=True):
        (alone,) = ask(text, **options)
        assert answer["generated_token_ids"][-6:] == alone["generated_token_ids"][-6:]


def test_mistakes():
    model, cache = make(), LagKVCache(CONFIG)
    ids, mask = padded(prompts((30, 20)))
    with pytest.raises(LRSAError, match=r"ends with padding.*pad on the left"):
        model.generate(ids, attention_mask=mask.flip(1), **GREEDY)
    with pytest.raises(LRSAError, match="a row of input_ids has no tokens"):
        prefill(model, ids, cache, attention_mask=mask * torch.tensor([[1], [0]]))
    with pytest.raises(LRSAError, match="1 for tokens and 0 for padding"):
        model(ids, attention_mask=mask * 2, past_key_values=cache)
    with pytest.raises(LRSAError, match="position_ids of row 1 do not continue after the 0 tokens"):
        model(ids, attention_mask=mask, position_ids=torch.arange(30)[None], past_key_values=cache)
    with pytest.raises(LRSAError, match=r"one document in each row, .* \(10, 20\)"):
        model(ids, attention_mask=mask, document_lengths=(10, 20), past_key_values=cache)
    prefill(model, ids, cache, attention_mask=mask)
    with pytest.raises(LRSAError, match="batch of 2 and was given one of 1"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(LRSAError, match=r"counts \[30, 30\] tokens of the rows as seen, .* seen \[30, 20\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 31), past_key_values=cache)


def test_autocast():
    """Rotary embeddings give queries and keys in fp32 there, and the values are in bf16."""
    model, (ids, mask) = make(), padded(prompts())
    for given in (mask, torch.ones_like(mask)):
        cache = LagKVCache(CONFIG)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            prefill(model, ids, cache, chunks_at_once=2, attention_mask=given)
            found = model(ids[:, :1], past_key_values=cache).logits.float()
        plain = LagKVCache(CONFIG)
        prefill(model, ids, plain, attention_mask=given)
        expected = model(ids[:, :1], past_key_values=plain).logits
        assert (found - expected).norm() <= 0.05 * expected.norm()
