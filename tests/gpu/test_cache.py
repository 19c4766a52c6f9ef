"""The invariant of `tests/cpu/test_cache.py` with the selection in Triton kernels, as caches on GPUs have it."""

from dataclasses import replace

import pytest
import torch

from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, lrsa_attention, prefill
from lrsa_ds.attention.cached import cached_attention
from lrsa_ds.attention.kernels.fa4 import what_fa4_misses
from lrsa_ds.models.cache import LagKVLayer
from tests.cpu.test_model import tiny
from tests.helpers import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "selection",
    [{}, dict(value_weight=0.3), dict(selection="key_norm"), dict(selection="random"), dict(selection="window")],
)
@pytest.mark.parametrize("steps", [(2000,), (1, 700, 1, 1, 640, 657), (300, 128, 128, 1444)])
def test_the_cache_is_the_training_pass(steps, selection):
    config = LRSAConfig(sink_size=5, lag_size=64, retention=0.3, backend="chunked", **selection)
    model = apply_lrsa(tiny("llama"), config).cuda()
    ids = torch.randint(1, 101, (1, sum(steps)), device="cuda")
    cache = LagKVCache(config)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split(steps, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, 1e-4, "logits")


@pytest.mark.parametrize("backend", ["chunked", "flex"])
def test_rows_of_a_padded_batch_are_those_alone(backend):
    config = LRSAConfig(sink_size=5, lag_size=64, retention=0.3, backend=backend)
    model = apply_lrsa(tiny("llama", head_dim=16), config).cuda()
    ids, lengths = torch.randint(1, 101, (3, 900), device="cuda"), (900, 500, 60)
    mask = torch.arange(900, device="cuda") >= 900 - torch.tensor(lengths, device="cuda")[:, None]
    cache = LagKVCache(config)
    found = [prefill(model, ids, cache, chunks_at_once=20, attention_mask=mask)]
    following = torch.randint(1, 101, (3, 70), device="cuda")
    with torch.no_grad():
        found += [model(column, past_key_values=cache).logits[:, -1] for column in following.split(1, dim=1)]
        for row, length in enumerate(lengths):
            whole = torch.cat([ids[row, 900 - length :], following[row]])[None]
            expected = model(whole, use_cache=False).logits[0, length - 1 :]
            assert_close(torch.stack(found, dim=1)[row], expected, 1e-4, "logits")


@pytest.mark.parametrize("backend,dtype,bound", [("flex", torch.float32, 1e-4), ("fa4", torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("count,max_tokens", [(3000, 300), (3000, 1000), (3000, 4000), (18000, 16389)])
def test_prefill_on_the_kernels_of_training(backend, dtype, bound, count, max_tokens):
    if backend == "fa4" and (missing := what_fa4_misses(torch.device("cuda"))):
        pytest.skip(missing)
    k, v = torch.randn(2, 1, 2, count, 64, device="cuda", dtype=dtype)
    q = torch.randn(1, 4, count, 64, device="cuda", dtype=dtype)
    config = LRSAConfig(sink_size=5, lag_size=128, retention=0.25, backend=backend)
    layer, found = LagKVLayer(config), []
    for start in range(0, count, max_tokens):
        part = slice(start, start + max_tokens)
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        held = (layer.keys, layer.values)  # what the layer holds now has been selected already
        found.append(cached_attention(q[:, :, part], keys, values, start, config, held=held))
        assert_close(found[-1], cached_attention(q[:, :, part], keys, values, start, config), 1e-3, "selected again")
    expected = lrsa_attention(q.float(), k.float(), v.float(), replace(config, backend="chunked"))
    assert_close(torch.cat(found, dim=2).float(), expected, bound, backend)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_prefill_is_the_training_pass(family):
    """Through Inductor, which may use the memory of keys and values again, for several lengths and for padded rows."""
    config = LRSAConfig(sink_size=5, lag_size=128, retention=0.25)
    model = apply_lrsa(tiny(family, head_dim=64), config).cuda()
    for count, most, room in ((3000, 16384, None), (1700, 700, None), (100, 16384, None), (2200, 1000, 2300)):
        ids, cache = torch.randint(1, 101, (1, count), device="cuda"), LagKVCache(config, room)
        logits = prefill(model, ids, cache, max_tokens_at_once=most, compile=True)
        token = torch.randint(1, 101, (1, 1), device="cuda")
        with torch.no_grad():
            expected = model(torch.cat([ids, token], dim=1), use_cache=False).logits[0, -2:]
            logits = torch.cat([logits, model(token, past_key_values=cache).logits[0]])
        assert_close(logits, expected, 1e-4, "logits")
    ids, lengths = torch.randint(1, 101, (2, 900), device="cuda"), (900, 500)
    mask = torch.arange(900, device="cuda") >= 900 - torch.tensor(lengths, device="cuda")[:, None]
    found = prefill(model, ids, LagKVCache(config), attention_mask=mask, compile=True)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model(ids[row : row + 1, 900 - length :], use_cache=False).logits[0, -1]
        assert_close(found[row], expected, 1e-4, "logits")
