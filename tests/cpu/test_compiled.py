"""Compiled passes of `prefill`: the logits of training, without a break in the graph, and compiled once."""

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa, new_cache, prefill
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


@pytest.fixture(params=["llama", "gemma2"])
def model(request):
    """Layers that differ, and layers with a window whose scores are capped."""
    settings = dict(num_hidden_layers=4, num_key_value_heads=1) if request.param == "llama" else {}
    COUNTERS.clear()
    return apply_lrsa(tiny(request.param, **settings), CONFIG, MIXED if request.param == "llama" else None)


def test_compiled_prefill_is_a_training_pass(model):
    """In one pass and in several, of several turns, behind growing and fixed caches."""
    for lengths, fixed, most in (((101,), None, 16384), ((77, 30), None, 40), ((33, 1, 20), 70, 16384)):
        ids, cache = torch.randint(1, 101, (1, sum(lengths))), new_cache(model, max_tokens=fixed)
        for part in ids.split(lengths, dim=1):
            found = compiled_prefill(model, part, cache, max_tokens_at_once=most)
        assert (found - last_logits(model, ids)).abs().max() <= 1e-4
        assert cache.num_held == num_held(sum(lengths), cache.config) and not cache.is_open
    assert COUNTERS["stats"]["unique_graphs"] == 1 and not COUNTERS["graph_break"]
    ids, lengths = torch.randint(1, 101, (3, 80)), torch.tensor([80, 9, 25])
    mask = torch.arange(80) >= 80 - lengths[:, None]
    for most in (16384, 30):
        found = compiled_prefill(model, ids, new_cache(model), attention_mask=mask, max_tokens_at_once=most)
        for row, length in enumerate(lengths.tolist()):
            assert (found[row] - last_logits(model, ids[row : row + 1, 80 - length :])[0]).abs().max() <= 1e-4
    assert COUNTERS["stats"]["unique_graphs"] == 2 and not COUNTERS["graph_break"]
