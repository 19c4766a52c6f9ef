"""Compiled passes of `prefill`: the logits of training, without a break in the graph, and compiled once."""

import weakref

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.joining import join
from lrsa_ds.attention.partition import num_held
from tests.cpu.test_decoding import MIXED
from tests.cpu.test_model import tiny

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
COUNTERS = torch._dynamo.utils.counters


def last_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -1]


def compiled_prefill(model, *args, **options):
    return prefill(model, *args, compile="aot_eager", **options)


def test_compiled_prefill_is_a_training_pass():
    """In one pass and in several, of several turns, behind growing and fixed caches, of layers that differ."""
    model = apply_lrsa(tiny("llama", num_hidden_layers=4, num_key_value_heads=1), CONFIG, MIXED)
    COUNTERS.clear()
    for lengths, fixed, most in (((101,), None, 16384), ((77, 30), None, 40), ((33, 1, 20), 70, 16384)):
        ids, cache = torch.randint(1, 101, (1, sum(lengths))), new_cache(model, max_tokens=fixed)
        for part in ids.split(lengths, dim=1):
            found = compiled_prefill(model, part, cache, max_tokens_at_once=most)
        assert (found - last_logits(model, ids)).abs().max() <= 1e-4
        assert cache.num_held == num_held(sum(lengths), cache.config) and not cache.is_open
    unused = weakref.ref(cache)
    del cache
    assert unused() is None, "the memory of a cache is free without a garbage collection"
    assert COUNTERS["stats"]["unique_graphs"] == 1 and not COUNTERS["graph_break"]
    ids, lengths = torch.randint(1, 101, (3, 80)), torch.tensor([80, 9, 25])
    mask = torch.arange(80) >= 80 - lengths[:, None]
    for most in (16384, 30):
        found = compiled_prefill(model, ids, new_cache(model), attention_mask=mask, max_tokens_at_once=most)
        for row, length in enumerate(lengths.tolist()):
            assert (found[row] - last_logits(model, ids[row : row + 1, 80 - length :])[0]).abs().max() <= 1e-4
    assert COUNTERS["stats"]["unique_graphs"] == 2 and not COUNTERS["graph_break"]


@pytest.mark.parametrize("family,is_skipped", [("qwen3", True), ("mixtral", False)])
def test_the_last_layer_computes_one_token(family, is_skipped):
    """If its MLP has the form of Llama's. Logits and cache are as ever, and so is a pass outside of `prefill`."""
    model, ids, sizes = apply_lrsa(tiny(family), CONFIG), torch.randint(1, 101, (1, 90)), []
    cache, expected = new_cache(model), new_cache(model)
    with torch.no_grad():
        logits = model(ids, past_key_values=expected).logits[:, -1]
    if is_skipped:
        model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    assert (prefill(model, ids, cache, max_tokens_at_once=30) - logits).abs().max() <= 1e-4
    assert set(sizes) == ({1} if is_skipped else set()) and cache.answering_layer is None
    for found, layer in zip(cache.layers, expected.layers, strict=True):
        assert (found.keys - layer.keys).abs().max() <= 1e-4
    assert model(ids[:, :2], past_key_values=cache).logits.shape[1] == 2 and sizes[-1:] == [2] * is_skipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [6, 8, 64])
def test_wide_copies(dtype, dim):
    """Of slices and of rows that are no whole number of 16 bytes; nothing is shared, and gradients flow."""
    x = torch.randn(2, 9, 3, dim, dtype=dtype).transpose(1, 2)
    for parts in ([x[:, :, 2:5], x[:, :, :0], x], [x[:, :1, 1:]], [x[:, :, 4:4]], [x[..., 1:], x[..., :-1]]):
        found = join(parts)
        assert torch.equal(found, torch.cat(parts, dim=2)) and found.untyped_storage() != x.untyped_storage()
    assert join([x.requires_grad_(), x]).requires_grad
