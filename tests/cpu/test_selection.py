"""Every selection rule: what it keeps, that training, prefill and decoding keep the same, and rules from outside."""

import copy

import pytest
import torch

import lrsa_ds
from lrsa_ds import LagKVCache, LRSAConfig, SelectionRule, apply_lrsa, prefill, register_selection, select_kept
from lrsa_ds.attention.buffered import buffered_attention
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.extras import PLAIN
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import CacheConfig
from lrsa_ds.registry import KERNELS, SELECTION_RULES
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.train.checkpoint import ResumePoint, check_resume, plain_settings
from tests.cpu.test_attention import LAYOUTS, assert_same_function, random_qkv
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache, tokens
from tests.cpu.test_model import tiny
from tests.helpers import assert_close

RULES = ["lagkv", "key_norm", "random", "window"]
CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)


def with_rule(rule, **settings):
    return LRSAConfig(**{**dict(sink_size=3, lag_size=8, retention=0.3, selection=rule), **settings})


@pytest.fixture
def newest():
    """A rule from outside, which keeps the last tokens of each partition."""
    rule = SelectionRule(score=lambda candidates: candidates.positions.float())
    register_selection("newest", rule)
    yield rule
    del SELECTION_RULES._entries["newest"]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 3.0, 1e6])
def test_lagkv_weighs_the_values_as_its_authors_do(weight):
    """score(K) + w * score(V), in fp64 and written from the paper's equations; w is their score_v_ratio."""
    k, v = torch.randn(2, 1, 2, 4 * 16, 12, dtype=torch.float64)
    kept = select_kept(k, v, LRSAConfig(sink_size=0, lag_size=16, retention=0.4, value_weight=weight))
    for head in range(2):
        for p in range(3):
            score = 0
            for z, factor in ((k, 1.0), (v, weight)):
                here, after = z[0, head, 16 * p : 16 * (p + 1)], z[0, head, 16 * (p + 1) : 16 * (p + 2)]
                low, high = after.amin(0), after.amax(0)
                score = score + factor * ((here - low) / (high - low)).std(-1).softmax(0)
            assert kept[0, head, p].tolist() == sorted((score.topk(6).indices + 16 * p).tolist())


def test_a_weight_of_0_reads_the_keys_alone():
    k, v = torch.randn(2, 1, 2, 64, 12)
    config = LRSAConfig(sink_size=0, lag_size=16, retention=0.25, value_weight=0.0)
    assert torch.equal(select_kept(k, v, config), select_kept(k, torch.randn_like(v), config))
    assert not torch.equal(select_kept(k, v, config), select_kept(k, v, LRSAConfig(sink_size=0, lag_size=16)))


def test_key_norm_keeps_the_smallest_keys():
    k, v = torch.randn(2, 2, 3, 60, 12)
    kept = select_kept(k, v, with_rule("key_norm"))
    norms = k[:, :, 3:51].norm(dim=-1).bfloat16().unflatten(2, (6, 8))
    smallest = norms.sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values + 3 + 8 * torch.arange(6)[:, None]
    assert torch.equal(kept, smallest)


def test_random_is_a_function_of_layer_head_and_position_alone():
    config = LRSAConfig(sink_size=4, lag_size=100, retention=0.25, selection="random")
    first, other = (select_kept(*torch.randn(2, 2, 3, 3000, 4), config) for _ in range(2))
    assert torch.equal(first, other) and torch.equal(first[0], first[1])
    assert torch.equal(select_kept(*torch.randn(2, 1, 3, 1000, 4), config), first[:1, :, :8])
    kept = [select_kept(*torch.randn(2, 1, 3, 3000, 4), config, layer)[0] for layer in range(4)]
    drawn = {tuple((heads[head, p] - 4 - 100 * p).tolist()) for heads in kept for head in range(3) for p in range(28)}
    assert len(drawn) == 4 * 3 * 28  # no two partitions, heads or layers alike
    places = torch.tensor([place for places in drawn for place in places]).bincount(minlength=100)
    assert len(places) == 100 and places.min() > 84 - 50 and places.max() < 84 + 50  # 84 each, and no token preferred


def test_window_keeps_nothing():
    config = with_rule("window")
    assert config.num_kept == 0 and not config.is_dense
    assert select_kept(*torch.randn(2, 1, 3, 60, 4), config).shape == (1, 3, 6, 0)
    assert with_rule("window", retention=1.0).is_dense
    sinks = LRSAConfig(sink_size=3, lag_size=100, retention=1e-3, selection="window")
    assert sinks.num_kept == 0  # another rule would refuse to keep nothing by mistake


@pytest.mark.parametrize("sink_size", [0, 5])
def test_window_sees_sink_and_window_alone(sink_size):
    """Against a dense mask; a sequence of several documents, one of them short."""
    config, lengths = with_rule("window", sink_size=sink_size), (61, 9, 40)
    q, k, v = random_qkv(sum(lengths), dtype=torch.float64)
    mask, start = torch.zeros(110, 110, dtype=torch.bool), 0
    for length in lengths:
        for t in range(length):
            chunk = max(0, (t - sink_size) // 8)
            mask[start + t, start : start + min(sink_size, t + 1)] = True
            mask[start + t, start + sink_size + max(0, chunk - 1) * 8 : start + t + 1] = True
        start += length
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_same_function(lrsa_ds.lrsa_attention(q, k, v, config, lengths), expected, (q, k, v), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "lagkv"])
def test_every_rule_through_the_kept_buffer(rule, layout):
    lengths = layout["lengths"]
    config = LRSAConfig(**{key: value for key, value in layout.items() if key != "lengths"}, selection=rule)
    inputs = random_qkv(sum(lengths))
    actual = buffered_attention(*inputs, config, lengths, PLAIN, KERNELS["chunked"], layer=1)
    expected = chunked_attention(*inputs, partition_table(lengths, config), layer=1)
    assert_same_function(actual, expected, inputs, 1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sink_size", [0, 3])
@pytest.mark.parametrize("rule", [*RULES, "newest"])
def test_training_prefill_and_decoding_keep_the_same(rule, sink_size, steps, newest):
    config = with_rule(rule, sink_size=sink_size)
    model, ids = apply_lrsa(tiny("qwen2"), config), tokens(83)
    actual = logits_with_cache(model, ids, LagKVCache(config), STEPS[steps](config))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4


def test_key_norm_of_tokens_that_repeat():
    """Their norms differ by rounding alone, which must not decide what a pass keeps."""
    config = with_rule("key_norm", lag_size=16)
    for seed in range(20):
        torch.manual_seed(seed)
        model, ids = apply_lrsa(tiny("llama"), config), torch.randint(1, 6, (1, 100))
        actual = logits_with_cache(model, ids, LagKVCache(config), lambda done: 1)
        assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0])
def test_training_prefill_and_decoding_weigh_the_values_alike(weight):
    config = with_rule("lagkv", value_weight=weight)
    model, ids = apply_lrsa(tiny("llama"), config), tokens(83)
    actual = logits_with_cache(model, ids, LagKVCache(config), lambda done: 13)
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_documents_of_a_packed_sequence_keep_what_they_keep_alone(rule):
    model, lengths = apply_lrsa(tiny("llama"), with_rule(rule)), (50, 7, 41)
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False, document_lengths=lengths).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert_close(packed, alone, 1e-5, "logits")


def test_the_rules_differ():
    """So that the tests above compare something."""
    model, ids = tiny("llama"), tokens(83)
    logits = [logits_of_training(apply_lrsa(model, with_rule(rule)), ids) for rule in RULES]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-3 for other in logits[:i])


@pytest.mark.parametrize("rule", [*RULES, "newest"])
def test_beams_copies_and_an_emptied_cache_keep_the_rule(rule, newest):
    config = with_rule(rule)
    model, ids = apply_lrsa(tiny("qwen2"), config), tokens(45, batch=2)
    cache = LagKVCache(config)
    first = prefill(model, ids, cache)
    again = prefill(model, tokens(30, batch=2), copy.deepcopy(cache))
    assert again.isfinite().all() and cache.get_seq_length() == 45
    cache.reset()
    assert torch.equal(prefill(model, ids, cache), first)
    dense = with_rule(rule, retention=1.0)
    filled = LagKVCache(dense)
    model(ids, past_key_values=filled)
    compressed = LagKVCache.from_dense(filled, config)
    for layer, full in zip(compressed.layers, filled.layers, strict=True):
        kept = select_kept(full.keys, full.values, config, layer.index).flatten(2)
        expected = full.keys.gather(2, kept[..., None].expand(-1, -1, -1, 12))
        assert torch.equal(layer.keys[:, :, 3 : 3 + kept.shape[2]], expected)


def test_saved_settings(tmp_path, newest):
    """Those of the first release still load; what it did not have is saved only where it says something."""
    assert LRSAConfig(**dict(sink_size=2, lag_size=8, retention=0.25, backend="auto")).selection == "lagkv"
    for config in (CONFIG, with_rule("newest"), with_rule("lagkv", value_weight=0.5)):
        model = apply_lrsa(tiny("qwen2"), config)
        model.save_pretrained(tmp_path)
        saved = type(model.config).from_pretrained(tmp_path).lrsa
        assert LRSAConfig(**saved) == config and ("selection" in saved) == (config.selection != "lagkv")
    cache = CacheConfig(retentions=[0.5])
    assert cache.attention(saved, 0.5).value_weight == 0.5 and cache.attention(None, 0.5).selection == "lagkv"
    other = CacheConfig(selection="key_norm").attention(saved, 0.5)
    assert other.selection == "key_norm" and other.value_weight == 1.0
    del SELECTION_RULES._entries["newest"]
    with pytest.raises(LRSAError, match=r"'newest' is not valid: choose one of lagkv, .* lrsa_ds.register_selection"):
        with_rule("newest")
    register_selection("newest", newest)


def test_resuming_goes_by_the_rule_too(tmp_path):
    def config(**settings):
        return TrainConfig(model=ModelConfig(name="some/model"), attention=AttentionConfig(**settings))

    def resume(settings, **now):
        check_resume(ResumePoint(tmp_path / "a" / "b", 3, {}, 1, settings, "data"), config(**now), "data")

    settings = plain_settings(config())
    del settings["attention"]["selection"], settings["attention"]["value_weight"]  # as an earlier release wrote it
    resume(settings)
    with pytest.raises(LRSAError, match=r"attention.selection='random' \(was 'lagkv'\)"):
        resume(settings, selection="random")
    with pytest.raises(LRSAError, match=r"attention.value_weight=0.5 \(was 1.0\)"):
        resume(settings, value_weight=0.5)
    resume(plain_settings(config(selection="random")), selection="random")


@pytest.mark.parametrize(
    "setting,said",
    [
        (dict(selection="best"), r"attention.selection='best' is not valid: choose one of lagkv, key_norm, random"),
        (dict(selection=None), r"attention.selection=None is not valid"),
        (dict(selection=["lagkv"]), r"attention.selection=\['lagkv'\] is not valid"),
        (dict(value_weight=-0.1), r"attention.value_weight=-0.1 .*at least 0"),
        (dict(value_weight=float("nan")), r"attention.value_weight=nan .*at least 0"),
        (dict(value_weight=float("inf")), r"attention.value_weight=inf .*at least 0"),
        (dict(value_weight="heavy"), r"attention.value_weight='heavy'"),
        (dict(selection="key_norm", value_weight=0.5), r"value_weight=0.5 has no effect with .*selection=key_norm"),
        (dict(selection="window", value_weight=2), r"value_weight=2 has no effect with .*selection=window"),
    ],
)
def test_bad_settings(setting, said):
    with pytest.raises(LRSAError, match=said):
        LRSAConfig(**setting)
    with pytest.raises(LRSAError, match=said):
        AttentionConfig(**setting)


def test_mistakes_in_a_rule(newest):
    register_selection("newest", newest)  # again, as a module that is imported twice does
    for name, rule, said in (
        ("lagkv", newest, "attention.selection=lagkv exists already"),
        ("new rule", newest, "is not a name"),
        ("other", lambda candidates: candidates.keys, "give a lrsa_ds.SelectionRule"),
    ):
        with pytest.raises(LRSAError, match=said):
            register_selection(name, rule)
    with pytest.raises(LRSAError, match=r"cannot read queries: it reads keys, values, reference, value_weight"):
        SelectionRule(score=lambda candidates: candidates.keys, reads=("queries",))
    with pytest.raises(LRSAError, match="one of the two"):
        SelectionRule()
    k, v = torch.randn(2, 1, 2, 40, 12)
    try:
        for score, said in (
            (lambda candidates: candidates.values.sum(-1), "reads values, and declares keys: add it to its `reads`"),
            (lambda candidates: candidates.key_reference.sum(-1), "reads reference, and declares keys"),
            (lambda candidates: candidates.keys[..., 0, 0], r"scores of shape \[1, 2, 3\]: give \[1, 2, 3, 8\]"),
        ):
            register_selection("wrong", SelectionRule(score=score, reads=("keys",)))
            with pytest.raises(LRSAError, match=said):
                select_kept(k, v, with_rule("wrong"))
            del SELECTION_RULES._entries["wrong"]
    finally:
        SELECTION_RULES._entries.pop("wrong", None)
