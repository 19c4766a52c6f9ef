"""Layers that attend to the keys and values of an earlier layer: what it keeps, stored once."""

from dataclasses import replace

import pytest
import torch

import lrsa_ds
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.partition import num_held
from lrsa_ds.costs.flops import seen_pairs
from lrsa_ds.costs.sizes import sizes_of
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_config, tiny_model
from lrsa_ds.layers import describe, in_model
from lrsa_ds.models.heads import HeadDims, head_dims, num_kv_heads
from lrsa_ds.models.patch import enable_checkpointing
from lrsa_ds.models.structure import layers_of
from lrsa_ds.registry import KERNELS
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.run import ParallelConfig
from lrsa_ds.train.checks import check_model
from tests import fused
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache
from tests.cpu.test_compiled import compiled_prefill
from tests.cpu.test_decoding import cache_of_padded_rows
from tests.cpu.test_memory import config_with
from tests.cpu.test_telemetry import CONFIG as TELEMETRY
from tests.cpu.test_telemetry import TOKENIZER, measurement
from tests.helpers import assert_close, relative_error

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
WINDOW = 16
# Four layers: a window, full attention, and one of each that attends to their keys and values.
FAMILIES = ("gemma3n_text", "gemma4_text")


def make(family, config=CONFIG, layers=None, **settings):
    return apply_lrsa(tiny_model(family, **settings), config, layers)


def tokens(count, batch=1):
    return torch.randint(4, 101, (batch, count))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param)


def gradients(model, ids, **options):
    parameters = dict(model.named_parameters())
    loss = model(ids, use_cache=False, **options).logits.square().mean()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_keys_from_every_layer_that_reads_them(family, monkeypatch):
    """Those of the stock model at retention 1. Recomputed layers change none, nor attention that is saved for them."""
    stock, ids = tiny_model(family), tokens(70)
    expected = gradients(stock, ids)
    dense = make(family, CONFIG.at_retention(1.0))
    for name, gradient in gradients(dense, ids).items():
        assert_close(gradient, expected[name], 1e-4, name)
    model = make(family)
    lengths, key = (41, 29), "model.layers.1.self_attn.k_proj.weight"
    expected = gradients(model, ids, document_lengths=lengths)
    model.model.layers[3].register_forward_pre_hook(_detached, with_kwargs=True)
    alone = gradients(model, ids, document_lengths=lengths)[key]
    assert relative_error(alone, expected[key]) > 1e-3, "the last layer gives the keys of its source a gradient"
    monkeypatch.setattr(KERNELS, "_entries", KERNELS._entries)  # the table without the kernel is back after the test
    kernel = replace(CONFIG, backend=fused.register())
    for config, offload, save_attention in ((CONFIG, False, False), (kernel, False, True), (kernel, True, True)):
        model = make(family, config).train()
        enable_checkpointing(model, offload, save_attention)
        for name, gradient in gradients(model, ids, document_lengths=lengths).items():
            assert_close(gradient, expected[name], 1e-4, name)


def _detached(module, args, kwargs):
    """Hook before a layer: it reads keys and values without a gradient."""
    shared = kwargs["shared_kv_states"]
    for kind, states in list(shared.items()):
        shared[kind] = tuple(x.detach() for x in states)


@pytest.mark.parametrize("selection", ["lagkv", "random"])  # a random rule depends on the number of the layer
@pytest.mark.parametrize("steps", STEPS)
def test_logits_are_those_of_training(steps, selection):
    config = replace(CONFIG, selection=selection)
    model, ids, cache = make("gemma4_text", config), tokens(83), LagKVCache(config)
    actual = logits_with_cache(model, ids, cache, STEPS[steps](config))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4


def test_the_cache_holds_shared_keys_once(model):
    ids, cache = tokens(83), new_cache(model)
    expected = logits_of_training(model, ids)[:, -1]
    assert (prefill(model, ids, cache, chunks_at_once=1) - expected).abs().max() <= 1e-4
    found = [layer for layer in cache.layers if hasattr(layer, "keys")]
    assert found == cache.layers[:2] and len(cache.layers) == 4
    held = [WINDOW - 1, num_held(83, CONFIG)]
    assert [layer.num_held for layer in found] == held and cache.num_held == sum(held) / 2
    assert cache.num_bytes == sum(2 * layer.keys.numel() * 4 for layer in found)
    assert cache.num_held == num_held(83, cache.config)
    copy, more = cache.fixed(90), tokens(1)
    again = [model(more, past_key_values=each).logits for each in (cache, copy)]
    assert_close(*again, 1e-5, "logits behind a copy")


def test_steps_behind_a_fixed_storage(model):
    cache = cache_of_padded_rows(model)
    sizes = [layer.storage[0].shape[2] for layer in cache.layers[:2]]
    assert sizes == [WINDOW, CONFIG.most_held(80)]


def test_compiled_passes():
    model = make("gemma4_text")
    cache_of_padded_rows(model, compiles="aot_eager")
    ids, cache = tokens(60), new_cache(model)
    found = compiled_prefill(model, ids, cache, max_tokens_at_once=25)
    assert (found - logits_of_training(model, ids)[:, -1]).abs().max() <= 1e-4


def test_a_pass_computes_only_the_last_tokens_in_layers_without_keys():
    """As Gemma 4 does: in several passes, of several last tokens, of padded rows."""
    model, ids, sizes = make("gemma4_text"), tokens(83, batch=2), []
    expected = logits_of_training(model, ids)
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    cache = new_cache(model)
    found = prefill(model, ids[:, :71], cache, max_tokens_at_once=40)
    assert (found - expected[:, 70]).abs().max() <= 1e-4
    mask = torch.arange(83) >= torch.tensor([0, 9])[:, None]
    with torch.no_grad():
        last = model(ids[:, 71:], past_key_values=cache, logits_to_keep=5).logits
        padded = model(ids, attention_mask=mask, past_key_values=new_cache(model), logits_to_keep=2).logits
    if hasattr(model.model, "_maybe_slice_kv_shared_inputs"):  # which older versions of transformers do not have
        assert sizes == [1, 1, 5, 2]
    assert (last - expected[:, -5:]).abs().max() <= 1e-4
    alone = torch.cat([expected[:1], logits_of_training(model, ids[1:, 9:])[:, -2:]], dim=1)[0, -4:]
    assert (padded.flatten(0, 1) - alone).abs().max() <= 1e-4


def test_generation(model):
    ids, options = tokens(40, batch=2), dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **options)
    assert torch.equal(lrsa_ds.generate(model, ids, **options), expected)
    with torch.no_grad():
        last = model(ids, use_cache=False, logits_to_keep=1).logits
    assert_close(last, logits_of_training(model, ids)[:, -1:], 1e-5, "logits of the last token")


def test_what_is_said_and_counted(model):
    own = layers_of(model.config)
    assert own.taken == [1] and [own.source(layer) for layer in range(4)] == [0, 1, 0, 1]
    settings = in_model(CONFIG, own)
    said = "layers 0 a sliding window of 16 tokens, 1 retention 0.3, 2 the keys and values of layer 0, 3 the keys and"
    assert describe(settings) == f"{said} values of layer 1"
    pairs = seen_pairs((50, 30), settings, 4)
    assert pairs[2:] == pairs[:2] and pairs[1] != pairs[0]
    with pytest.raises(
        LRSAError, match=r"layer 3, of which LRSA takes none: .* layer 3 keeps the keys and values of l"
    ):
        new_cache(model, {"3": 1.0, "rest": 0.5})
    assert new_cache(model, {"1": 1.0}).config.is_dense
    other = tiny_model("gemma3n_text")
    other.config.num_kv_shared_layers = 4  # as a model that reads the keys of another one
    with pytest.raises(LRSAError, match=r"has layers that attend to the keys and values of another model: LRSA cannot"):
        apply_lrsa(other, CONFIG)


def test_telemetry_takes_the_mean_over_the_layers_that_read_the_keys():
    model = make("gemma3n_text", TELEMETRY, vocab_size=len(TOKENIZER), vocab_size_per_layer_input=len(TOKENIZER))
    (layer,) = measurement(model, layers_of(model.config)).run().layers
    assert layer.layer == 1 and all(0 < share < 1 for share in layer.dropped_mass)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_checked_and_its_plan_refused(family):
    shape = {"model_type": family, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size": 400}
    shape["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = replace(config_with(seq_len=16384), model=ModelConfig(random=shape, tokenizer="bytes"))
    assert layers_of(check_model(config)[1].config).taken == [1]
    assert layers_of(check_model(replace(config, parallel=ParallelConfig(sp_size=2)), 2)[1].config).taken == [1]
    with pytest.raises(LRSAError, match=r"gives every layer inputs of its own \(hidden_size_per_layer_input=256\)"):
        sizes_of(tiny_model(family))


def test_heads_are_those_of_full_attention():
    config = tiny_config("gemma4_text")
    assert head_dims(config) == HeadDims(16, 16) and num_kv_heads(config) == 2
    assert head_dims(tiny_config("gemma3n_text")) == HeadDims(8, 8)
