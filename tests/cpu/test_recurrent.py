"""Recurrent layers beside LRSA: documents apart, states in the cache, and what is said and refused."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import lrsa_ds
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.partition import num_held
from lrsa_ds.costs.shape import model_shape
from lrsa_ds.costs.sizes import sizes_of
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.evaluator import modes
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.layers import describe, in_model
from lrsa_ds.models.decoder import Decoder
from lrsa_ds.models.patch import enable_checkpointing
from lrsa_ds.models.recurrent import check_unshared, recurrent_modules
from lrsa_ds.models.structure import layers_of
from lrsa_ds.notices import say_once
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.run import ParallelConfig
from lrsa_ds.train.checks import check_model
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache
from tests.cpu.test_decoding import Calls, cache_of_padded_rows
from tests.cpu.test_evaluate import TOKENIZER, make_evaluator, make_sample
from tests.cpu.test_memory import config_with
from tests.cpu.test_telemetry import CONFIG as TELEMETRY
from tests.cpu.test_telemetry import measurement
from tests.helpers import assert_close, relative_error

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
# A gated delta rule and a short convolution.
FAMILIES = ("qwen3_next", "lfm2")
SHAPE = {"model_type": "qwen3_next", "num_hidden_layers": 4, "vocab_size": 400, "num_experts": 4}


def make(family="qwen3_next", config=CONFIG, **settings):
    return apply_lrsa(tiny_model(family, **settings), config)


def tokens(count, batch=1):
    return torch.randint(4, 101, (batch, count))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param)


def test_retention_one_is_the_stock_model_and_so_is_another_attention():
    stock, ids = tiny_model("qwen3_next"), tokens(70, batch=2)
    expected = logits_of_training(stock, ids)
    model = make(config=CONFIG.at_retention(1.0))
    assert_close(logits_of_training(model, ids), expected, 1e-5, "logits")
    assert relative_error(logits_of_training(make(), ids), expected) > 1e-3
    model.set_attn_implementation("sdpa")
    assert_close(logits_of_training(model, ids), expected, 1e-5, "logits")
    with pytest.raises(LRSAError, match="serves models with LRSA attention"):
        model(ids, past_key_values=LagKVCache(CONFIG))


@pytest.mark.parametrize("steps", STEPS)
def test_logits_are_those_of_training(model, steps):
    ids, cache = tokens(83, batch=2), LagKVCache(CONFIG)
    actual = logits_with_cache(model, ids, cache, STEPS[steps](CONFIG))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4
    assert cache.num_held == num_held(83, CONFIG) and cache.get_seq_length() == 83
    of_states = sum(x.numel() for x in cache.states.tensors)
    assert cache.num_bytes == 4 * (of_states + 2 * 2 * 2 * 8 * cache.num_held)  # keys and values, 2 rows and KV heads


# Mamba-1, which follows a state token by token; Mamba-2 with limited time steps, beside layers that only have an MLP;
# and in the same layer as attention, with time steps that are scaled too.
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("jamba", {}),
        ("nemotron_h", {}),
        ("falcon_h1", dict(time_step_limit=(0.5, 0.9), ssm_multipliers=[1.0, 1.0, 1.0, 1.0, 0.3])),
    ],
)
def test_logits_of_other_families(family, settings):
    model, ids = make(family, **settings), tokens(57)
    steps = iter([13, 1, 1, 20, 1, 30])
    actual = logits_with_cache(model, ids, LagKVCache(CONFIG), lambda done: next(steps))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("lengths", [[(37, 1, 25), (20, 43)], [(37, 1, 25)] * 2], ids=["differ", "alike"])
def test_documents_are_what_each_is_alone(model, lengths):
    """Of two rows: logits and gradients, with recomputed layers, after passes over other documents."""
    model, ids = copy.deepcopy(model).train(), tokens(63, batch=2)
    documents = [part for row, each in zip(ids, lengths, strict=True) for part in row.split(each)]
    alone = [model(document[None], use_cache=False).logits[0] for document in documents]
    upstream = torch.randn(126, alone[0].shape[1])
    parameters = list(model.parameters())
    expected = torch.autograd.grad((torch.cat(alone) * upstream).sum(), parameters)
    enable_checkpointing(model)
    packed = lengths[0] if lengths[0] == lengths[1] else lengths[0] + lengths[1]
    actual = model(ids, use_cache=False, document_lengths=packed).logits.flatten(0, 1)
    model(ids, use_cache=False)
    assert_close(actual, torch.cat(alone), 1e-5, "logits")
    gradients = torch.autograd.grad((actual * upstream).sum(), parameters)
    for one, other in zip(gradients, expected, strict=True):
        assert_close(one, other, 1e-4, "gradient")


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths(model, side):
    ids, lengths = tokens(46, batch=3), (46, 9, 25)
    mask = torch.arange(46) < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    cache, more = new_cache(model), tokens(20, batch=3)
    found = [prefill(model, ids, cache, attention_mask=mask, max_tokens_at_once=17)]
    found += [
        prefill(model, part, cache, attention_mask=torch.ones_like(part)) for part in more.split([1] * 12 + [8], 1)
    ]
    for row, length in enumerate(lengths):
        text = torch.cat([ids[row][mask[row]], more[row]])[None]
        expected = logits_of_training(model, text)[0, [*range(length - 1, length + 12), length + 19]]
        assert (torch.stack(found, dim=1)[row] - expected).abs().max() <= 1e-4


def test_fixed_storage(model):
    cache_of_padded_rows(model)
    ids, cache, options = tokens(30), new_cache(model, max_tokens=80), dict(max_new_tokens=12, do_sample=False)
    options |= dict(pad_token_id=127, eos_token_id=None)
    expected = model.generate(ids, **options)
    found = lrsa_ds.generate(model, ids, cache, **options)
    assert found.tolist() == expected.tolist()
    # Another turn, and the first one again, in the same storage.
    storage, text = cache.storage, torch.cat([found, tokens(7)], dim=1)
    options |= dict(attention_mask=torch.ones_like(text))
    assert lrsa_ds.generate(model, text, cache, **options).tolist() == model.generate(text, **options).tolist()
    options |= dict(attention_mask=torch.ones_like(ids))
    cache.reset()
    assert lrsa_ds.generate(model, ids, cache, **options).tolist() == expected.tolist() and cache.storage == storage
    growing = new_cache(model)
    prefill(model, ids[:, :-1], growing)
    assert lrsa_ds.generate(model, ids, growing.fixed(80), **options).tolist() == expected.tolist()
    assert growing.get_seq_length() == 29
    with pytest.raises(LRSAError, match="compiles no recurrent layers"):
        lrsa_ds.generate(model, ids, compile=True)
    with pytest.raises(LRSAError, match="compiles no recurrent layers"):
        prefill(model, ids, growing, compile=True)


def test_a_step_that_is_not_counted_changes_nothing(model):
    ids, cache, asked = tokens(30), new_cache(model, max_tokens=60), []
    prefill(model, ids, cache)
    decoder = Decoder(model, captures=False)
    decoder.start(cache)
    first = decoder(cache, torch.tensor([5])).clone()
    assert torch.equal(decoder(cache, torch.tensor([5])), first)  # as when a graph is captured, or runs ahead
    for token in (5, 6, 7):
        with Calls() as calls:
            decoder(cache, torch.tensor([token]))
        decoder.end_step(cache)
        asked.append(calls.made)
    assert asked[0] == asked[1] == asked[2]


def test_beams_and_rows_that_move(model):
    ids, options = tokens(22, batch=2), dict(max_new_tokens=6, do_sample=False, num_beams=2, pad_token_id=0)
    expected = model.generate(ids, use_cache=False, **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()
    cache = new_cache(model)
    prefill(model, ids, cache)
    cache.batch_select_indices(torch.tensor([1]))
    logits = model(tokens(1), past_key_values=copy.deepcopy(cache)).logits
    assert logits.shape[0] == 1 and all(len(x) == 1 for x in cache.states.tensors)
    with pytest.raises(LRSAError, match="cannot be cut back"):
        cache.crop(-1)


def test_a_dense_cache_is_compressed(model):
    ids, dense, expected = tokens(60), new_cache(model, {"0-": 1.0}), new_cache(model)
    prefill(model, ids, dense)
    prefill(model, ids, expected)
    compressed = LagKVCache.from_dense(dense, CONFIG)
    assert compressed.num_held == expected.num_held == num_held(60, CONFIG) and compressed.get_seq_length() == 60
    for one, other in zip(compressed.states.tensors, expected.states.tensors, strict=True):
        assert_close(one, other, 1e-5, "state")
    assert torch.isfinite(model(tokens(1), past_key_values=compressed).logits).all()


def test_a_model_is_copied_and_pickled(model):
    ids, expected = tokens(40), logits_of_training(model, tokens(40))
    expected = logits_of_training(model, ids)
    other = copy.deepcopy(model)
    for module in recurrent_modules(other):
        next(module.parameters()).data.zero_()
    assert relative_error(logits_of_training(other, ids), expected) > 1e-2
    assert_close(logits_of_training(model, ids), expected, 1e-6)
    assert_close(logits_of_training(apply_lrsa(pickle.loads(pickle.dumps(model)), CONFIG), ids), expected, 1e-6)


def test_what_counts_and_what_does_not():
    model = make()
    settings = in_model(CONFIG, layers_of(model.config))
    assert num_held(83, settings) == num_held(83, CONFIG)
    assert describe(settings) == "layers 0 linear attention or a state space, 1 retention 0.3"
    assert [layer.recurrence is None for layer in model_shape(model).layers] == [False, True]
    assert sizes_of(model).num_layers == 2


def test_a_recurrence_that_needs_a_gpu_has_no_cost(monkeypatch):
    def needs_gpu(self, *_, **__):
        raise RuntimeError("no kernel for meta")

    model = tiny_model("qwen3_next")
    monkeypatch.setattr("lrsa_ds.costs.recurrence.FlopCounterMode", needs_gpu)
    assert model_shape(model) is None
    with pytest.raises(LRSAError, match=r"recurrent layers \(Qwen3NextGatedDeltaNet\), whose cost is not known"):
        sizes_of(model)


def test_evaluation_and_telemetry():
    model = make(vocab_size=TOKENIZER.vocab_size + 10, config=TELEMETRY)
    found = measurement(model, layers_of(model.config)).run(num_greedy=1)
    assert [layer.layer for layer in found.layers] == [1] and found.nll_compressed != found.nll_dense
    evaluator = make_evaluator()
    evaluator.model, evaluator.attention = model, in_model(TELEMETRY, layers_of(model.config))
    for row in evaluator.rows(make_sample(), modes(["dense", "chunked", "after"], [0.3])):
        assert row["num_held"] == num_held(row["num_tokens"], TELEMETRY.at_retention(row["retention"]))


def test_what_is_said_and_refused():
    say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"LRSA takes layer 1; layer 0 keeps linear attention or a state space\."):
        model = make()
    check_unshared(model, 1)
    sentence = r"parallel.sp_size=2 .* layer 0 of Qwen3NextForCausalLM \(Qwen3NextGatedDeltaNet\) .* parallel.sp_size=1"
    with pytest.raises(LRSAError, match=sentence):
        check_unshared(model, 2)
    shared = replace(config_with(seq_len=8192), model=ModelConfig(random=SHAPE, tokenizer="bytes"))
    assert layers_of(check_model(shared)[1].config).taken == [3]
    with pytest.raises(LRSAError, match=sentence.replace("layer 0", "layers 0-2")):
        check_model(replace(shared, parallel=ParallelConfig(sp_size=2)), 2)
    with pytest.raises(LRSAError, match="ranks cannot share a sequence there"):  # in a loop without that check
        model(tokens(20), position_ids=torch.arange(20)[None], use_cache=False, document_lengths=(25, 15))
    with pytest.raises(LRSAError, match=r"no layer of full attention.*: layers 0-1 keep linear attention"):
        apply_lrsa(tiny_model("mamba2"), CONFIG)
