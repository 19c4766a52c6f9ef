"""The compiled interval attention of sequence parallelism: output, log-sum-exp and every gradient through both."""

import pytest
import torch

from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, prefill
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.interval import Intervals, interval_attention, merge
from lrsa_ds.registry import KERNELS
from tests.cpu.test_model import tiny
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["flex", "fa4"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_queries,num_keys,heads,kv_heads", [(40, 300, 4, 2), (1000, 777, 3, 1), (513, 4096, 8, 8)])
def test_kernels_are_the_same_function(backend, dtype, tolerance, num_queries, num_keys, heads, kv_heads, poison_empty):
    reason = KERNELS[backend].why_not(torch.device("cuda"), dtype, 64)
    if reason:
        pytest.skip(reason)
    shapes = [(1, heads, num_queries, 64)] + 2 * [(1, kv_heads, num_keys, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    lo = torch.randint(0, num_keys, (num_queries,), dtype=torch.int32, device="cuda")
    hi = (lo + torch.randint(0, num_keys // 2, (num_queries,), dtype=torch.int32, device="cuda")).clamp(max=num_keys)
    hi[::7] = lo[::7]
    intervals = Intervals(lo, hi)
    # A second part in which every query sees something, as the window is to the history.
    everything = Intervals(torch.zeros_like(lo), torch.full_like(hi, num_keys))
    upstream = torch.randn(shapes[0], device="cuda", dtype=dtype)
    results = []
    for attend in (KERNELS[backend].attend, interval_attention):
        merged = merge(attend(*inputs, everything, Extras(0.1)), attend(*inputs, intervals, Extras(0.1)), dtype)
        results.append((merged, *torch.autograd.grad(merged, inputs, upstream)))
    errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prefill_and_decoding_follow_the_training_pass(family):
    config = LRSAConfig(sink_size=16, lag_size=128, retention=0.25)
    model = apply_lrsa(tiny(family, head_dim=64, max_position_embeddings=4096), config).cuda()
    ids, cache = torch.randint(1, 101, (1, 1500), device="cuda"), LagKVCache(config)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert relative_error(prefill(model, ids[:, :1400], cache), expected[:, 1399]) < 1e-2
        for token in range(1400, 1410):
            logits = model(ids[:, token : token + 1], past_key_values=cache).logits
            assert relative_error(logits[:, 0], expected[:, token]) < 1e-2
