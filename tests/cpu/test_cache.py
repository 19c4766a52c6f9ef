"""The one invariant: a training pass, chunk-by-chunk prefill and decoding with the cache are one function."""

import copy
import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import lrsa_ds
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, load, prefill, select_kept
from lrsa_ds.attention.cached import cached_attention, cached_attention_on
from lrsa_ds.attention.partition import cache_factor, num_held, room_in_chunk
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.cache import LagKVLayer
from lrsa_ds.registry import KERNELS
from tests.cpu.test_model import FAMILIES, tiny
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)


def make(family="llama", config=CONFIG, **settings):
    return apply_lrsa(tiny(family, **settings), config)


def tokens(count, batch=1):
    return torch.randint(1, 101, (batch, count))  # generate() takes 0 for padding


def logits_of_training(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def logits_with_cache(model, ids, cache, step):
    """All logits, from forward passes of `step(tokens seen)` tokens each."""
    parts, done = [], 0
    with torch.no_grad():
        while done < ids.shape[1]:
            part = ids[:, done : done + step(done)]
            parts.append(model(part, past_key_values=cache).logits)
            done += part.shape[1]
    return torch.cat(parts, dim=1)


STEPS = {
    "token by token": lambda config: lambda done: 1,
    "chunk by chunk": lambda config: lambda done: room_in_chunk(done, config),
    "across chunks": lambda config: lambda done: 13,
    "a chunk and a half": lambda config: lambda done: config.lag_size * 3 // 2,
    "all at once": lambda config: lambda done: 10**6,
}
SETTINGS = [
    dict(num_tokens=101, sink_size=3, lag_size=8, retention=0.3),  # r * L is not whole
    dict(num_tokens=64, sink_size=0, lag_size=8, retention=0.25),
    dict(num_tokens=67, sink_size=16, lag_size=7, retention=0.5),
    dict(num_tokens=61, sink_size=5, lag_size=10, retention=1.0),
    dict(num_tokens=21, sink_size=5, lag_size=8, retention=0.5),  # S + 2L: the first compression
    dict(num_tokens=20, sink_size=5, lag_size=8, retention=0.5),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_training_for_every_family(family, steps):
    model, ids = make(family), tokens(83)
    actual = logits_with_cache(model, ids, LagKVCache(CONFIG), STEPS[steps](CONFIG))
    expected = logits_of_training(model, ids)
    assert (actual - expected).abs().max() <= 1e-4
    assert_close(actual, expected, 1e-5, "logits")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_those_of_training_for_all_settings(settings, steps, kv_heads):
    num_tokens = settings["num_tokens"]
    config = LRSAConfig(**{key: value for key, value in settings.items() if key != "num_tokens"})
    model, ids = make("qwen2", config, num_key_value_heads=kv_heads), tokens(num_tokens)
    actual = logits_with_cache(model, ids, LagKVCache(config), STEPS[steps](config))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4


def expected_length(num_tokens, config):
    """LagKV, arXiv 2504.04704, equation 12."""
    sink, lag = config.sink_size, config.lag_size
    if num_tokens < sink + 2 * lag:
        return num_tokens
    return sink + config.num_kept * ((num_tokens - sink) // lag - 1) + lag + (num_tokens - sink) % lag


def test_length_and_memory_after_every_token():
    model, cache, ids = make(), LagKVCache(CONFIG), tokens(90)
    assert cache.num_held == cache.num_bytes == 0
    for done in range(ids.shape[1]):
        model(ids[:, done : done + 1], past_key_values=cache)
        assert cache.get_seq_length() == done + 1
        assert cache.num_held == num_held(done + 1, CONFIG) == expected_length(done + 1, CONFIG)
        # Keys and values of 2 layers, 2 KV heads, 12 channels in fp32: no hidden copy of what was dropped.
        assert cache.num_bytes == 2 * 2 * 2 * 12 * 4 * cache.num_held


def test_how_much_smaller_a_cache_is():
    config = LRSAConfig(sink_size=16, lag_size=512, retention=0.125)
    assert num_held(8192, config) == 1920
    assert cache_factor([8192], config) == pytest.approx(4.27, abs=0.005)
    assert cache_factor([8192], replace(config, retention=0.25)) == pytest.approx(2.91, abs=0.005)
    assert cache_factor([4096], LRSAConfig(sink_size=16, lag_size=1024, retention=0.25)) == 1.6
    assert cache_factor([1039, 500], config) == 1.0  # S + 2L - 1, and less
    assert cache_factor([1040], config) == 1040 / (1040 - 448)
    assert cache_factor([1040, 1000], config) == 2040 / (2040 - 448)
    assert cache_factor([8192], replace(config, retention=1.0)) == 1.0


def test_the_kept_are_those_that_selection_names():
    model, ids = make(), tokens(90)
    dense, cache = DynamicCache(), LagKVCache(CONFIG)
    apply_lrsa(model, CONFIG)
    prefill(model, ids, cache, chunks_at_once=1)
    model.set_attn_implementation("sdpa")
    # Token for token in the same passes: products of other sizes may be rounded otherwise.
    for part in ids.split((CONFIG.dense_prefix_size, *[CONFIG.lag_size] * 8, 7), dim=1):
        model(part, past_key_values=dense)
    # The keys and values of the first layer do not depend on the attention.
    keys, values = dense.layers[0].keys, dense.layers[0].values
    kept = select_kept(keys, values, CONFIG).flatten(2)
    for held, all_of_them in ((cache.layers[0].keys, keys), (cache.layers[0].values, values)):
        history = held[:, :, CONFIG.sink_size : CONFIG.sink_size + kept.shape[2]]
        assert torch.equal(history, all_of_them.gather(2, kept[..., None].expand(-1, -1, -1, 12)))
        assert torch.equal(held[:, :, : CONFIG.sink_size], all_of_them[:, :, : CONFIG.sink_size])
        rest = held.shape[2] - CONFIG.sink_size - kept.shape[2]
        assert torch.equal(held[:, :, -rest:], all_of_them[:, :, -rest:])


def test_compressing_a_dense_cache():
    model, ids, dense = tiny("llama"), tokens(90), DynamicCache()
    model(ids, past_key_values=dense)
    cache = LagKVCache.from_dense(dense, CONFIG)
    assert cache.get_seq_length() == 90 and cache.num_held == expected_length(90, CONFIG)
    for layer, full in zip(cache.layers, dense.layers, strict=True):
        kept = select_kept(full.keys, full.values, CONFIG).flatten(2)
        history = layer.keys[:, :, 3 : 3 + kept.shape[2]]
        assert torch.equal(history, full.keys.gather(2, kept[..., None].expand(-1, -1, -1, 12)))
    apply_lrsa(model, CONFIG)
    assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
    everything = LagKVCache.from_dense(dense, LRSAConfig(sink_size=3, lag_size=8, retention=1.0))
    assert everything.num_held == 90


@pytest.mark.parametrize("chunks_at_once", [1, 2, 5])
def test_prefill_in_larger_parts_gives_the_same(chunks_at_once):
    model, ids, cache = make("qwen3"), tokens(101), LagKVCache(CONFIG)
    logits = prefill(model, ids, cache, chunks_at_once)
    assert (logits - logits_of_training(model, ids)[:, -1]).abs().max() <= 1e-4
    assert cache.get_seq_length() == 101 and cache.num_held == expected_length(101, CONFIG)


@pytest.mark.parametrize("prefilled", [False, True])
def test_greedy_answers_are_the_likeliest_tokens_of_a_training_pass(prefilled):
    model, ids, cache = make("qwen2"), tokens(45), LagKVCache(CONFIG)
    if prefilled:
        prefill(model, ids[:, :-1], cache)
    answer = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(answer[:, :45], ids)
    expected = logits_of_training(model, answer).argmax(-1)[:, 44:-1]
    assert torch.equal(answer[:, 45:], expected)


def test_several_turns():
    model, cache = make("mistral"), LagKVCache(CONFIG)
    text = tokens(30)
    for _ in range(3):
        mask = torch.ones_like(text)
        text = model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=9, do_sample=False)
        text = torch.cat([text, tokens(11)], dim=1)
    logits = prefill(model, text[:, cache.get_seq_length() :], cache)
    assert (logits - logits_of_training(model, text)[:, -1]).abs().max() <= 1e-4


def test_sampling_draws_what_the_dense_cache_draws_if_all_is_kept():
    config = LRSAConfig(sink_size=3, lag_size=8, retention=1.0)
    dense, ids = tiny("llama"), tokens(40)
    options = dict(max_new_tokens=30, do_sample=True, top_k=20, pad_token_id=0)
    torch.manual_seed(5)
    expected = dense.generate(ids, **options)
    torch.manual_seed(5)
    apply_lrsa(dense, config)
    assert torch.equal(dense.generate(ids, past_key_values=LagKVCache(config), **options), expected)


def test_beams():
    """The score that the beams report is the one that a training pass gives to the returned answers."""
    model, ids = make("llama"), tokens(35)
    found = model.generate(
        ids, past_key_values=LagKVCache(CONFIG), num_beams=3, num_return_sequences=3, max_new_tokens=25,
        do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True, length_penalty=1.0,
        eos_token_id=-1,
    )  # fmt: skip
    logp = logits_of_training(model, found.sequences).log_softmax(-1)[:, 34:-1]
    scores = logp.gather(2, found.sequences[:, 35:, None]).squeeze(2).sum(1) / 25
    assert_close(found.sequences_scores, scores, 1e-4, "scores")


def test_beams_from_a_prefilled_cache():
    model, ids, cache = make("llama"), tokens(35), LagKVCache(CONFIG)
    prefill(model, ids[:, :-1], cache)
    options = dict(num_beams=3, max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, past_key_values=LagKVCache(CONFIG), **options)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(3)
    for behind in (cache, repeated):
        assert torch.equal(model.generate(ids, past_key_values=behind, **options), expected)


def test_a_batch_equals_its_rows_alone():
    model, ids = make("qwen3"), tokens(60, batch=3)
    together = model.generate(ids, past_key_values=LagKVCache(CONFIG), max_new_tokens=12, do_sample=False)
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1], past_key_values=LagKVCache(CONFIG), max_new_tokens=12, do_sample=False
        )
        assert torch.equal(together[row : row + 1], alone)


def test_a_saved_model_is_loaded_with_its_settings(tmp_path):
    model, ids = make("qwen2"), tokens(75)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer, new_cache = load(tmp_path, device="cpu")
    assert tokenizer("a").input_ids and not loaded.training
    cache = new_cache()
    assert (cache.config.sink_size, cache.config.lag_size, cache.config.retention) == (3, 8, 0.3)
    logits = prefill(loaded, ids, cache)
    assert (logits - logits_of_training(model, ids)[:, -1]).abs().max() <= 1e-4
    tiny("qwen2").save_pretrained(tmp_path / "other")
    with pytest.raises(LRSAError, match="saved without LRSA settings"):
        load(tmp_path / "other")
    if not torch.cuda.is_available():
        with pytest.raises(LRSAError, match="liger_kernel=true needs a CUDA device"):
            load(tmp_path, liger_kernel=True)


def test_mistakes():
    model, ids, cache = make(), tokens(30), LagKVCache(CONFIG)
    prefill(model, ids, cache)
    with pytest.raises(LRSAError, match="batch of 1 and was given one of 2"):
        model(tokens(3, batch=2), past_key_values=cache)
    with pytest.raises(LRSAError, match="cannot be cut back"):
        cache.crop(-1)
    with pytest.raises(LRSAError, match="has no tokens"):
        prefill(model, ids[:, :0], cache)
    with pytest.raises(LRSAError, match="chunks_at_once=0"):
        prefill(model, ids, cache, chunks_at_once=0)
    with pytest.raises(LRSAError, match="4D attention_mask"):
        model(ids, attention_mask=torch.zeros(1, 1, 30, 30), use_cache=False)
    with pytest.raises(LRSAError, match=r"call lrsa_ds.apply_lrsa\(model, config\) first"):
        tiny("llama")(ids, past_key_values=LagKVCache(CONFIG))
    model.set_attn_implementation("sdpa")
    with pytest.raises(LRSAError, match=r"call lrsa_ds.apply_lrsa\(model, config\) first"):
        model(ids, past_key_values=LagKVCache(CONFIG))


def test_other_settings_than_those_of_the_training_are_said():
    model, ids = make(), tokens(30)
    other = LRSAConfig(sink_size=3, lag_size=8, retention=0.5)
    with pytest.warns(UserWarning, match=r"keeps sink_size=3, lag_size=8, retention=0.5, .*trained with .*=0.3:"):
        model(ids, past_key_values=LagKVCache(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, past_key_values=LagKVCache(CONFIG))


def test_a_cache_may_be_emptied_and_used_again():
    model, ids, cache = make(), tokens(50), LagKVCache(CONFIG)
    first = prefill(model, ids, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(prefill(model, ids, cache), first)


@pytest.mark.parametrize("kernel", ["chunked", "flex"])
@pytest.mark.parametrize("retention", [0.3, 1.0])
@pytest.mark.parametrize(
    "seen,new,lag",
    [
        *((0, 300, 32), (37, 200, 32), (130, 130, 32), (200, 1, 32), (211, 140, 32), (20, 5, 32)),
        *((0, 600, 128), (389, 300, 128), (450, 200, 128)),
    ],
)
def test_a_pass_on_a_kernel_is_the_readable_one(kernel, retention, seen, new, lag):
    """Behind any cache, in one chunk and in many; on the CPU FlexAttention runs uncompiled."""
    config = LRSAConfig(sink_size=5, lag_size=lag, retention=retention)
    k, v = torch.randn(2, 2, 2, seen + new, 16)
    q, layer = torch.randn(2, 4, new, 16), LagKVLayer(config)
    if seen:
        layer.update(k[:, :, :seen], v[:, :, :seen])
    keys, values = layer.update(k[:, :, seen:], v[:, :, seen:])
    expected = cached_attention(q, keys, values, seen, config)
    for held in (None, (layer.keys, layer.values)):
        found = cached_attention_on(KERNELS[kernel], q, keys, values, seen, config, held=held)
        assert_close(found, expected, 1e-5, kernel)
    assert_close(cached_attention(q, keys, values, seen, config, held=held), expected, 1e-6, "held")


@pytest.mark.parametrize("max_tokens", [1, 7, 19, 40, 1000])
def test_prefill_in_parts_of_any_size_keeps_the_same(max_tokens):
    model, ids = make("qwen3"), tokens(101)
    cache, expected = LagKVCache(CONFIG), LagKVCache(CONFIG)
    logits = prefill(model, ids, cache, max_tokens_at_once=max_tokens)
    assert (logits - prefill(model, ids, expected, chunks_at_once=1)).abs().max() <= 1e-4
    for found, layer in zip(cache.layers, expected.layers, strict=True):
        assert_close(found.keys, layer.keys, 1e-5, "keys")
    with pytest.raises(LRSAError, match="max_tokens_at_once=0"):
        prefill(model, ids, cache, max_tokens_at_once=0)


def test_memory_is_free_without_a_garbage_collection():
    model, ids = make(), tokens(40)
    for call in (prefill, lambda *args: lrsa_ds.generate(*args, max_new_tokens=3, do_sample=False)):
        cache = LagKVCache(CONFIG, None if call is prefill else 60)
        gc.disable()
        call(model, ids, cache)
        unused = weakref.ref(cache)
        del cache
        gc.enable()
        assert unused() is None


def test_a_cache_is_open_only_during_a_pass():
    model, states = make(), torch.zeros(1, 2, 1, 12)
    unused, used, failed = (LagKVCache(CONFIG) for _ in range(3))
    model(tokens(1), past_key_values=used)
    with pytest.raises(TypeError, match="scaling"):  # the attention is given its scale twice
        model(tokens(1), past_key_values=failed, scaling=1.0)
    for cache in (unused, used, failed):
        with pytest.raises(LRSAError, match="serves models with LRSA attention"):
            cache.update(states, states, 0)
