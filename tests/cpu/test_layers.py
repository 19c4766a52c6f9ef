"""Layers that differ: what is written, what each layer gets, and that everything behind it follows."""

import warnings

import pytest
import torch
from transformers import DynamicCache

import lrsa_ds
from launch.cli.command import plain_keys
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.partition import cache_factor, num_held
from lrsa_ds.compression import held_sentence
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import CacheConfig
from lrsa_ds.evaluate.evaluator import modes
from lrsa_ds.layer_ranges import read_layers, written_layers
from lrsa_ds.layers import describe, from_saved, resolve
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.caches import caches_of
from lrsa_ds.settings.run import EvalConfig
from tests.cpu.test_cache import STEPS, expected_length, logits_of_training, logits_with_cache, tokens
from tests.cpu.test_config import composed
from tests.cpu.test_evaluate import make_evaluator, make_sample
from tests.cpu.test_model import tiny
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
# Of a model of four layers.
LAYERS = {
    "dense first": {"0": 1.0, "1-": 0.3},
    "three kinds": {"0-1": 0.5, 2: None, "3-": 1.0},
    "dense and window": {"1, 3": 1.0, "rest": 0.0},
    "sizes of their own": {"0 2-3": {"retention": 0.5, "lag_size": 5, "selection": "key_norm"}, "rest": None},
    "every layer its own": {
        0: CONFIG,
        1: LRSAConfig(sink_size=0, lag_size=10, retention=0.5, selection="key_norm"),
        2: LRSAConfig(sink_size=7, lag_size=5, retention=0.2, selection="random"),
        3: LRSAConfig(sink_size=3, lag_size=8, retention=0.3, selection="window"),
    },
}


def make(layers="dense first", **settings):
    return apply_lrsa(tiny("qwen2", num_hidden_layers=4, **settings), CONFIG, LAYERS[layers])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("layers", LAYERS)
def test_training_prefill_and_decoding_are_one_function(layers, steps):
    model, ids = make(layers), tokens(83)
    actual = logits_with_cache(model, ids, new_cache(model), STEPS[steps](CONFIG))
    expected = logits_of_training(model, ids)
    assert (actual - expected).abs().max() <= 1e-4
    cache = new_cache(model)
    assert (prefill(model, ids, cache, chunks_at_once=2) - expected[:, -1]).abs().max() <= 1e-4
    uniform = logits_of_training(apply_lrsa(model, CONFIG), ids)
    assert (uniform - expected).abs().max() > 1e-3  # the layers make a difference


def test_generation_and_packed_documents():
    model, lengths = make("every layer its own"), (50, 7, 41)
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False, document_lengths=lengths).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert_close(packed, alone, 1e-5, "logits")
    answer = model.generate(ids[:, :45], max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert torch.equal(answer[:, 45:], logits_of_training(model, answer).argmax(-1)[:, 44:-1])


@pytest.mark.parametrize("layers", LAYERS)
def test_held_and_bytes_are_those_of_all_layers(layers):
    model, ids = make(layers), tokens(90)
    cache = new_cache(model)
    assert cache.num_held == cache.num_bytes == 0
    prefill(model, ids, cache)
    settings = from_saved(model.config.lrsa)
    held = [90 if config.is_dense else expected_length(90, config) for config in settings.layers]
    assert [layer.keys.shape[2] for layer in cache.layers] == held and len(set(held)) > 1
    assert cache.num_held == num_held(90, settings) == sum(held) / 4
    assert cache.num_bytes == 2 * 2 * 12 * 4 * sum(held)
    assert cache_factor([90, 90], settings) == pytest.approx(90 * 4 / sum(held))
    assert f"{round(sum(held) / 4):,} entries on average" in held_sentence(90, [settings])


def test_saved_and_loaded(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    for layers in LAYERS:
        model, ids = make(layers), tokens(75)
        model.save_pretrained(tmp_path)
        loaded, _, fresh = lrsa_ds.load(tmp_path, device="cpu")
        assert loaded.config.lrsa == model.config.lrsa and len(loaded.config.lrsa["layers"]) == 4
        logits = prefill(loaded, ids, fresh())
        assert (logits - logits_of_training(model, ids)[:, -1]).abs().max() <= 1e-4
    assert [layer["retention"] for layer in make("three kinds").config.lrsa["layers"]] == [0.5, 0.5, 0.3, 1.0]
    # Layers that are alike are saved as they always were.
    model = apply_lrsa(model, CONFIG, {"0-2": 0.3, "3": None})
    assert model.config.lrsa == dict(sink_size=3, lag_size=8, retention=0.3, backend="auto")
    assert new_cache(model).config == CONFIG


@pytest.mark.parametrize(
    "layers,said",
    [
        ({"0-1": 1.0, "1-": 0.3}, r"attention.layers names layer 1 twice, in 0-1, 1-"),
        ({"0-": 1.0, "3": 0.3}, r"names layer 3 twice"),
        ({"0": 1.0, "2-": 0.3}, r"leaves out layer 1: the model has 4 layers"),
        ({"2-": 0.3}, r"leaves out layers 0-1"),
        ({"0-1": 0.3}, r"leaves out layers 2-3: the model has 4 layers, 0 to 3; 'rest' means all"),
        ({"0-4": 0.3}, r"names layer 4, and the model has 4 layers, 0 to 3"),
        ({"0-3": 0.3, "4-": 1.0}, r"names layer 4, and the model has 4 layers"),
        ({0: CONFIG, 1: CONFIG, 2: CONFIG}, r"leaves out layer 3: the model has 4 layers"),
        ({"0-": 1.5}, r"attention.layers \(of layer 0-\)=1.5 is not valid"),
        ({"0-": "all"}, r"attention.layers \(of layer 0-\)='all' is not valid"),
        ({"first": 1.0}, r"has the key 'first': give layers or ranges"),
        ({"0 2 2": 1.0, "rest": 0.3}, r"names layer 2 twice, in 0 2 2, rest"),
        ({"0-": 1.0, "rest": 0.3}, r"names every layer, so 'rest' has no layers: the model has 4 layers"),
        ({"1 9": 1.0, "rest": 0.3}, r"names layer 9, and the model has 4 layers"),
        ({"": 1.0}, r"has the key ''"),
        (
            {"rest": {"lag": 3}},
            r"\(of layer rest\) has 'lag', which is not a setting: choose retention, sink_size, lag",
        ),
        ({"rest": {"retention": 2}}, r"\(of layer rest\)=2 is not valid"),
        ({"rest": {"lag_size": 1}}, r"attention.lag_size=1"),
        ({"rest": {"selection": "best"}}, r"attention.selection='best' is not valid"),
        ({"1-0": 1.0}, r"'1-0', which ends before it begins"),
        ({-1: 1.0}, r"has the key -1"),
        ({1.0: 1.0}, r"has the key 1.0"),
        ({"0-": 0.01}, r"attention.retention=0.01 keeps nothing"),
    ],
)
def test_mistakes(layers, said):
    with pytest.raises(LRSAError, match=said):
        apply_lrsa(tiny("qwen2", num_hidden_layers=4), CONFIG, layers)
    if not any(isinstance(value, LRSAConfig) for value in layers.values()):
        with pytest.raises(LRSAError, match=said):
            AttentionConfig(sink_size=3, lag_size=8, layers=layers).resolved(4)


def test_a_cache_of_another_model():
    model, ids = make(), tokens(40)
    with pytest.raises(LRSAError, match=r"call lrsa_ds.apply_lrsa\(model, config\) first"):
        new_cache(tiny("llama"))
    other = apply_lrsa(tiny("qwen2", num_hidden_layers=2), CONFIG, {0: 1.0, 1: 0.3})
    with pytest.raises(LRSAError, match=r"cache is one of 2 layers, and the model has 4: .*lrsa_ds.new_cache\(model\)"):
        model(ids, past_key_values=new_cache(other))
    filled = LagKVCache(CONFIG)
    apply_lrsa(other, CONFIG)(ids, past_key_values=filled)
    with pytest.raises(LRSAError, match=r"cache is one of 2 layers, and the model has 4"):
        model(ids[:, :1], past_key_values=filled)
    with pytest.raises(LRSAError, match=r"settings are for 4 layers, and the model has 2"):
        apply_lrsa(other, from_saved(model.config.lrsa))
    with pytest.warns(UserWarning, match=r"keeps sink_size=3.*trained with layers 0 .*retention=1, 1-3 .*=0.3; mean"):
        model(ids, past_key_values=LagKVCache(CONFIG))
    dense = DynamicCache()
    model.set_attn_implementation("sdpa")
    model(ids, past_key_values=dense)
    compressed = LagKVCache.from_dense(dense, from_saved(model.config.lrsa))
    assert [layer.keys.shape[2] for layer in compressed.layers] == [40, *[expected_length(40, CONFIG)] * 3]


def test_steps_and_caches():
    """Layers keep their own at every step but a dense one; None follows the steps, and evaluation the dense layers."""
    attention = AttentionConfig(retention=[0.125, 0.25, 1.0], layers={"0": 1.0, "1": 0.5, "2-": None}).resolved(4)
    retentions = [[layer.retention for layer in attention.at_step(step).layers] for step in range(4)]
    assert retentions == [[1.0, 0.5, 0.125, 0.125], [1.0, 0.5, 0.25, 0.25], [1.0], [1.0, 0.5, 0.125, 0.125]]
    assert [layer.retention for layer in attention.with_retention(0.25).layers] == [1.0, 0.25, 0.25, 0.25]
    caches = caches_of(attention, EvalConfig(retentions=[1.0, 0.25]), 4)
    assert [cache.retention for cache in caches[:3]] == [1.0, 0.25, (1 + 0.5 + 0.125 + 0.125) / 4]
    assert [cache.config for cache in caches[2:]] == attention.turns[:2] and caches[0].config.is_dense
    assert [cache.name for cache in caches[:2]] == ["dense", "1 dense + 3 at 1/4"]
    assert attention.described(4).startswith(
        "layers 0 dense, 1 retention 0.5, 2-3 retention 0.125; mean share kept 0.438"
    )
    one = EvalConfig(retentions=[0.25])
    assert caches_of(AttentionConfig(layers={"0-1": 1.0, "2-": 0.25}), one, 4)[1:] == []
    assert caches_of(AttentionConfig(retention=0.5), one, 4) == [("1/4", 0.25, LRSAConfig(retention=0.25))]
    assert AttentionConfig(layers={"0-": 1.0}).resolved(4).at_step(0).is_dense
    with pytest.raises(LRSAError, match=r"attention.layers has no effect under dense attention"):
        AttentionConfig(kind="dense", retention=1.0, layers={"0-": 0.5})


ELASTIC = [{"0-": 1.0}, {"0 2": 1.0, "rest": 0.0}, {"2": 1.0, "rest": {"retention": 0.0, "lag_size": 6}}]


def test_lists_are_taken_in_turn():
    attention = AttentionConfig(layers=ELASTIC, retention=[0.5, 0.25]).resolved(4)
    shares = [[layer.share_kept for layer in attention.at_step(step).layers] for step in range(7)]
    assert shares == [[1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]] * 2 + [[1.0]]
    assert [layer.lag_size for layer in attention.at_step(2).layers] == [6, 6, 1024, 6]
    described = "dense, then layers 0 2 dense, 1 3 window; mean share kept 0.5, then layers 0-1 3 window, 2 dense"
    assert attention.described(4).startswith(described)
    # Nothing but that which differs by the retention of the step is another setting.
    follows = AttentionConfig(layers=[{"0": 1.0, "rest": None}, {"0-": 1.0}, {"0-": 0.5}], retention=[0.5, 0.25])
    assert len(follows.resolved(4).turns) == 4
    assert attention.with_retention(0.125) == LRSAConfig()  # which layers stay dense differs by step
    with pytest.raises(LRSAError, match="leaves out layers 1-3: the model has 4 layers"):
        AttentionConfig(layers=[{"0-": 1.0}, {"0": 1.0}]).resolved(4)
    for wrong in (5, "0-: 1.0", [3], [{}], [None]):
        with pytest.raises(LRSAError, match=r"write '?(attention.layers=)?\{3 7-9: 1.0, rest: 0.25\}"):
            AttentionConfig(layers=wrong)


def test_all_that_was_trained_with_is_evaluated():
    names = [cache.name for cache in caches_of(AttentionConfig(layers=ELASTIC), EvalConfig(retentions=[1.0]), 4)]
    assert names == ["dense", "2 dense + 2 window", "1 dense + 3 window"]
    dense = AttentionConfig(kind="dense", retention=1.0)
    same = caches_of(dense, EvalConfig(retentions=[1.0], layers=ELASTIC), 4)
    assert [cache.name for cache in same] == names and same[1].config.layers[1].num_kept == 0
    sizes = [{"0-": {"retention": 0.25, "lag_size": lag}} for lag in (64, 128)] + [{"0": 1.0, "rest": 0.0}] * 2
    sizes.append({"1": 1.0, "rest": 0.0})
    found = caches_of(AttentionConfig(layers=ELASTIC), EvalConfig(retentions=[1.0, 0.25], layers=sizes), 4)
    assert [cache.name for cache in found] == [
        *("dense", "1/4, L = 1024", "1/4, L = 64", "1/4, L = 128"),
        *("1 dense + 3 window, L = 1024 (5)", "1 dense + 3 window, L = 1024 (6)"),
    ]
    assert caches_of(AttentionConfig(layers=ELASTIC), EvalConfig(retentions=[1.0], layers=[]), 4)[1:] == []
    with pytest.raises(LRSAError, match=r"eval.layers names layer 9"):
        caches_of(dense, EvalConfig(layers={"9": 1.0, "rest": 0.0}), 4)
    with pytest.raises(LRSAError, match=r"eval.layers has the key 'all'"):
        EvalConfig(layers={"all": 1.0})


def test_a_model_trained_in_turn_serves_all_its_caches(tmp_path):
    """It has the settings of the smallest cache by itself, remembers the others, and answers under any of them."""
    configs = [CONFIG.at_retention(1.0), *(resolve(CONFIG, layers, 4) for layers in ELASTIC[1:])]
    model, ids = tiny("qwen2", num_hidden_layers=4), tokens(83)
    apply_lrsa(model, [configs[0], configs[2], configs[1]])
    byte_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded, _, fresh = lrsa_ds.load(tmp_path, device="cpu")
    assert lrsa_ds.trained_caches(loaded) == configs and fresh().config == new_cache(loaded).config == configs[2]
    layered = {"0 2": 1.0, "rest": {"retention": 0.0, "lag_size": 8}}
    caches = [LagKVCache(config) for config in configs] + [fresh(), fresh({"0-": 1.0}), fresh(layered)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of them are what the model was trained with
        for cache, place in zip(caches, (0, 1, 2, 2, 0, 1), strict=True):
            logits = prefill(loaded, ids, cache)
            expected = model(ids, use_cache=False, lrsa_config=configs[place]).logits[:, -1]
            assert (logits - expected).abs().max() <= 1e-4 and cache.num_held == num_held(83, configs[place])
    assert lrsa_ds.load(tmp_path, device="cpu", layers={"0-": 1.0}).new_cache().config.is_dense
    with pytest.warns(UserWarning, match="and, in turn, "):
        prefill(loaded, ids, LagKVCache(CONFIG))


def test_layers_as_they_are_written():
    assert written_layers([11, 3, 7, 9, 10]) == "3 7 9-11"
    assert read_layers({written_layers([0, 2, 3]): 1.0, "rest": 0.5}).of_each(5) == [1.0, 0.5, 1.0, 1.0, 0.5]
    assert read_layers({" 0 - 1 , 3": 1.0, "rest": None}).of_each(4) == [1.0, 1.0, None, 1.0]


@pytest.mark.parametrize(
    "written",
    [
        "attention.layers={0-1: 1.0, 2-: 0.1}",
        "attention.layers={'0-1': 1.0, '2-': 0.1}",
        'attention.layers={"0-1":1.0,"2-":0.1}',
        "attention.layers={0:1.0,1:1.0,2-:0.1}",
        'attention.layers={"0,1": 1.0, "rest": 0.1}',
        "attention.layers=[{0 1: 1.0, rest: {retention: 0.1}}]",
        'attention.layers=[{"2 3": {"retention": 0.1}, "rest": 1.0}, {"0-": 1.0}]',
    ],
)
def test_the_command_line(written):
    written = plain_keys(written)
    attention = composed(written).attention.resolved(4)
    assert [layer.retention for layer in attention.at_step(0).layers] == [1.0, 1.0, 0.1, 0.1]
    assert composed(written).run_name.endswith("-lrsa-layers-8192")


def test_quotes_stay_where_they_are_no_keys():
    for argument in ("run_name='a: b'", "data.path='{\"a\": 1}'", "+recipe=smoke", "data.columns={context: 'a, b: c'}"):
        assert plain_keys(argument) == argument
    assert plain_keys("+a.b={'c d': 1, \"e\": {'f': 'g, h: i'}}") == "+a.b={c d: 1, e: {f: 'g, h: i'}}"


def test_the_caches_of_an_evaluation():
    saved = make("three kinds").config.lrsa
    base = CacheConfig().caches(saved)
    assert describe(base) == "layers 0-1 retention 0.5, 2 retention 0.3, 3 dense; mean share kept 0.562"
    assert base.at_retention(base.share_kept) is base and base.at_retention(1.0).is_dense
    assert [layer.retention for layer in CacheConfig().attention(saved, 0.25).layers] == [0.25, 0.25, 0.25, 1.0]
    assert CacheConfig(lag_size=16, selection="random").caches(saved).layers[2].selection == "random"
    assert CacheConfig(lag_size=2).caches(None) == LRSAConfig(lag_size=2, retention=1.0)


def test_an_evaluation_of_layers_that_differ():
    """Each cache holds what its layers keep, also that of the training, which is named by the mean share."""
    evaluator = make_evaluator()
    apply_lrsa(evaluator.model, evaluator.attention, {0: 1.0, 1: None})
    evaluator.attention = CacheConfig().caches(evaluator.model.config.lrsa)
    assert evaluator.attention.share_kept == 0.625
    saved = evaluator.model.config.lrsa
    evaluator.differing = CacheConfig(layers={"1": 1.0, "rest": 0.0}).differing(saved, 2)
    assert list(evaluator.differing) == ["1 dense + 1 at 1/4", "1 dense + 1 window"]
    rows = evaluator.rows(make_sample(), modes(["dense", "chunked", "after"], [0.5], evaluator.differing))
    assert len(rows) == 7
    for row in rows:
        mine = evaluator.differing.get(row["layers"]) or evaluator.attention.at_retention(row["retention"])
        expected = num_held(row["num_tokens"], mine)
        assert row["num_held"] == expected and (row["prefill"] == "dense") == (expected == row["num_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the cache of the training is what the model expects
        prefill(evaluator.model, tokens(60), LagKVCache(evaluator.attention))
