"""Layers with a sliding window beside LRSA: one function in training, prefill and decoding, counted as they are."""

import copy

import pytest
import torch

from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, load, new_cache, prefill
from lrsa_ds.attention import layer_attention
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.interval import interval_attention
from lrsa_ds.attention.kinds.local import cached_local_attention, cached_local_attention_on, document_intervals
from lrsa_ds.attention.kinds.sliding_window import SlidingWindow
from lrsa_ds.attention.partition import num_held
from lrsa_ds.compression import Compression
from lrsa_ds.costs.flops import seen_pairs
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import CacheConfig
from lrsa_ds.evaluate.evaluator import modes
from lrsa_ds.layers import cache_names, describe, in_model
from lrsa_ds.models.structure import layers_of
from lrsa_ds.notices import say_once
from lrsa_ds.parallel.sequence.gather_kept import early_and_late
from lrsa_ds.parallel.sequence.halo import halo_layout
from lrsa_ds.registry import KERNELS
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.caches import caches_of
from lrsa_ds.settings.run import EvalConfig
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache, tokens
from tests.cpu.test_decoding import cache_of_padded_rows
from tests.cpu.test_evaluate import TOKENIZER, make_evaluator, make_sample
from tests.cpu.test_model import SIZES, tiny
from tests.cpu.test_telemetry import CONFIG as TELEMETRY
from tests.cpu.test_telemetry import measurement
from tests.helpers import assert_close, relative_error

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
WINDOW = 11
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# Where the kind of each layer stands in the configuration: a list, or a number of layers.
FAMILIES = {
    "olmo3": dict(layer_types=MIXED, sliding_window=WINDOW),
    "gemma3_text": dict(layer_types=MIXED, sliding_window=WINDOW),
    "qwen2": dict(use_sliding_window=True, max_window_layers=2, sliding_window=WINDOW),
}


def make(family="olmo3", config=CONFIG, layers=None, **settings):
    settings = {"num_hidden_layers": 4, **FAMILIES[family], **settings}
    return apply_lrsa(tiny(family, **settings), config, layers)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("family", FAMILIES)
def test_retention_one_is_the_stock_model(family):
    stock = tiny(family, num_hidden_layers=4, **FAMILIES[family])
    ids = tokens(70, batch=2)
    expected = stock(ids, use_cache=False).logits
    full = tiny(family, num_hidden_layers=4, **FAMILIES[family] | {"sliding_window": 511})
    assert relative_error(full(ids, use_cache=False).logits, expected) > 1e-2  # the windows hide something
    actual = apply_lrsa(stock, CONFIG.at_retention(1.0))(ids, use_cache=False).logits
    assert_close(actual, expected, 1e-5, "logits")


@pytest.mark.parametrize("window", [1, WINDOW])
@pytest.mark.parametrize("steps", STEPS)
def test_logits_are_those_of_training(window, steps):
    model, ids = make(sliding_window=window), tokens(83)
    cache = LagKVCache(CONFIG)
    actual = logits_with_cache(model, ids, cache, STEPS[steps](CONFIG))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4
    assert [layer.num_held for layer in cache.layers] == [window - 1, num_held(83, CONFIG)] * 2
    # Keys and values, 2 KV heads, 12 channels in fp32: no hidden copy of what was dropped.
    assert cache.num_bytes == 2 * 2 * 12 * 4 * sum(layer.num_held for layer in cache.layers)


def test_documents_are_kept_apart(model):
    lengths = (50, 7, 41)
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert_close(packed, alone, 1e-5, "logits")


def test_steps_behind_a_fixed_storage(model):
    cache = cache_of_padded_rows(model)
    assert cache.layers[0].storage[0].shape[2] == WINDOW


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths(model, side):
    """Padded prompts, prefilled in passes, and tokens behind them."""
    ids, lengths = tokens(46, batch=3), (45, 9, 28)
    mask = torch.arange(46) < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    cache = new_cache(model)
    found = [prefill(model, ids, cache, attention_mask=mask, max_tokens_at_once=17)]
    more = tokens(20, batch=3)
    found += [prefill(model, part, cache, attention_mask=torch.ones_like(part)) for part in more.split(1, dim=1)]
    for row, length in enumerate(lengths):
        text = torch.cat([ids[row][mask[row]], more[row]])[None]
        expected = logits_of_training(model, text)[0, length - 1 :]
        assert (torch.stack(found, dim=1)[row] - expected).abs().max() <= 1e-4
    held = [WINDOW - 1, sum(num_held(length + 20, CONFIG) for length in lengths) / 3]
    assert [layer.num_held for layer in cache.layers] == held * 2


def test_generation_and_what_is_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, ids = load(str(tmp_path), device="cpu"), tokens(60)
    options = dict(max_new_tokens=6, do_sample=False)
    found = loaded.model.generate(ids, past_key_values=loaded.new_cache(), **options)
    assert found.tolist() == model.generate(ids, **options).tolist()
    dense = loaded.new_cache({"rest": 1.0})
    prefill(model, ids, dense)
    compressed, expected = LagKVCache.from_dense(dense, CONFIG), new_cache(model)
    assert compressed.config == expected.config and compressed.get_seq_length() == 60
    with torch.no_grad():
        model(ids, past_key_values=expected)
    first = compressed.layers[1]  # what precedes it is the same in both
    assert_close(first.keys, expected.layers[1].keys, 1e-5)
    assert [layer.num_held for layer in compressed.layers] == [layer.num_held for layer in expected.layers]
    assert torch.isfinite(model(tokens(1), past_key_values=copy.deepcopy(compressed)).logits).all()
    with pytest.raises(LRSAError, match="layer 1 of the cache holds"):
        LagKVCache.from_dense(compressed, CONFIG)


def test_kernels_see_one_interval():
    """What a kernel is given in training, computed by the readable one: output and gradients."""
    lengths, config = (150, 1, 149), SlidingWindow(window=70)
    q, k, v = inputs = [torch.randn(1, heads, 300, 8, requires_grad=True) for heads in (4, 2, 2)]
    expected = layer_attention(q, k, v, config, lengths, 0.3)
    intervals = document_intervals(lengths, config, torch.device("cpu"))
    actual = interval_attention(q, k, v, intervals, Extras(0.3))[0]
    assert_close(actual, expected, 1e-5)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(output, inputs, upstream) for output in (actual, expected))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-5, "gradient")


@pytest.mark.parametrize("seen", [0, 5, 200])
def test_kernels_behind_a_cache(seen):
    config, num_new = SlidingWindow(window=70), 130
    q = torch.randn(1, 4, num_new, 8)
    k, v = (torch.randn(1, 2, config.num_held(seen) + num_new, 8) for _ in range(2))
    actual = cached_local_attention_on(KERNELS["chunked"], q, k, v, seen, config)
    assert_close(actual, cached_local_attention(q, k, v, seen, config), 1e-5)


@pytest.mark.parametrize("owners", [early_and_late(2), early_and_late(3), (0, 1, 2, 3)])
@pytest.mark.parametrize("halo", [0, 3, 10, 25, 1000])
def test_halos_come_from_as_many_ranks_as_it_takes(owners, halo):
    length, ranks = 10, range(max(owners) + 1)
    num_tokens = length * len(owners)
    layouts = [halo_layout(owners, num_tokens, halo, rank) for rank in ranks]
    held = [torch.cat([torch.arange(num_tokens)[part] for part in layout.stretches]) for layout in layouts]
    for rank, layout in enumerate(layouts):
        sent = [torch.cat([held[r][:0], *(held[r][part] for part in layouts[r].sent[rank])]) for r in ranks]
        assert [len(x) for x in sent] == list(layout.num_received)
        for part, begin, pieces in zip(layout.stretches, layout.begins, layout.pieces, strict=True):
            assert begin == max(0, part.start - halo)
            found = [token for sender, piece in pieces for token in sent[sender][piece].tolist()]
            assert found == list(range(begin, part.start))


def test_windows_count_as_what_they_are(model):
    own = layers_of(model.config)
    settings = in_model(CONFIG, own)
    assert own.taken == [1, 3] and settings.share_kept == CONFIG.share_kept
    assert num_held(83, settings) == (WINDOW - 1 + num_held(83, CONFIG)) / 2
    assert settings.at_retention(1.0).is_dense and num_held(83, settings.at_retention(1.0)) == (WINDOW - 1 + 83) / 2
    assert Compression.of([83], settings).num_held == num_held(83, settings)
    of_window = sum(min(t + 1, WINDOW) for length in (50, 30) for t in range(length))
    assert seen_pairs((50, 30), settings, 4)[::2] == [of_window] * 2
    assert seen_pairs((50, 30), settings, 4)[1::2] == seen_pairs((50, 30), CONFIG, 2)
    assert describe(settings) == "layers 0 2 a sliding window of 11 tokens, 1 3 retention 0.3"
    assert cache_names([settings, settings.at_retention(1.0)]) == ["0.3", "dense"]


def test_layers_that_lrsa_takes_may_differ():
    layers = {"1": 1.0, "rest": 0.5}
    model = make(layers=layers)
    cache = new_cache(model)
    logits = logits_with_cache(model, tokens(83), cache, STEPS["across chunks"](CONFIG))
    assert torch.isfinite(logits).all()
    held = [WINDOW - 1, 83, WINDOW - 1, num_held(83, CONFIG.at_retention(0.5))]
    assert [layer.num_held for layer in cache.layers] == held
    assert cache.config.share_kept == 0.75
    attention = AttentionConfig(sink_size=3, lag_size=8, retention=0.3, layers=layers)
    own = layers_of(model.config)
    (dense, named) = caches_of(attention, EvalConfig(retentions=[1.0]), own)
    assert (dense.name, named.name) == ("dense", "1 dense + 1 at 1/2") and named.config == cache.config
    assert attention.resolved(own).resolved(own) == attention.resolved(own)  # as a run that is resumed writes it
    # Layers that are alike are one setting, whatever is written for those of other kinds.
    alike = make(layers={"0-1": 0.5, "3": 0.5})
    assert alike.config.lrsa == CONFIG.at_retention(0.5).saved()


def test_telemetry_measures_what_lrsa_takes():
    model = make(vocab_size=len(TOKENIZER), config=TELEMETRY)
    found = measurement(model, layers_of(model.config)).run(num_greedy=1)
    assert [layer.layer for layer in found.layers] == [1, 3] and found.greedy[0].layer in (1, 3)
    assert found.nll_compressed != found.nll_dense and found.retention == TELEMETRY.retention


def test_an_evaluation_counts_windows():
    evaluator = make_evaluator()
    model = evaluator.model = make(vocab_size=TOKENIZER.vocab_size + 10)
    own = layers_of(model.config)
    evaluator.attention = in_model(CacheConfig().caches(model.config.lrsa), own)
    evaluator.differing = CacheConfig(layers={"1": 1.0, "rest": 0.0}).differing(model.config.lrsa, own)
    assert list(evaluator.differing) == ["1 dense + 1 window"]
    rows = evaluator.rows(make_sample(), modes(["dense", "chunked", "after"], [0.3], evaluator.differing))
    for row in rows:
        cache = evaluator.differing.get(row["layers"]) or evaluator.attention.at_retention(row["retention"])
        assert row["num_held"] == num_held(row["num_tokens"], cache) < row["num_tokens"]
        assert ("first_token" in row["scores"]) == (row["prefill"] != "dense")


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (
            {"0": 1.0, "rest": 0.5},
            "layer 0, of which LRSA takes none: .* of which LRSA takes 1 3; layers 0 2 keep a sl",
        ),
        ({"1": 1.0}, "leaves out layer 3"),
        ({"0-": 1.0, "rest": 0.5}, "names every layer"),
    ],
)
def test_layers_that_lrsa_does_not_take(model, layers, sentence):
    with pytest.raises(LRSAError, match=sentence):
        new_cache(model, layers)


def test_what_is_said_and_refused():
    say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"LRSA takes layers 1 3; layers 0 2 keep a sliding window of 11 tokens\."):
        make()
    with pytest.raises(LRSAError, match=r"MistralForCausalLM has no layer of full attention.*set sliding_window to nu"):
        apply_lrsa(tiny("mistral", sliding_window=WINDOW), CONFIG)
    apply_lrsa(tiny("mistral", sliding_window=SIZES["max_position_embeddings"]), CONFIG)  # it hides nothing
    with pytest.raises(LRSAError, match="sliding_window"):
        SlidingWindow(window=0)
