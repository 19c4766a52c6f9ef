"""Settings of memory on a GPU: the same gradients, less memory or less work, and buffers that are pinned once."""

import gc
from dataclasses import replace

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.models.patch import enable_checkpointing, to_device
from lrsa_ds.registry import KERNELS
from tests.cpu.test_model import tiny
from tests.helpers import assert_close

pytestmark = pytest.mark.gpu
LAYERS, TOKENS, SIZE = 8, 8192, 512


def measured(offload, save_attention=False, **settings):
    """Sums of gradients of three passes, the peak memory of the third beyond weights and gradients, and the store."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=LAYERS, hidden_size=SIZE, intermediate_size=SIZE, head_dim=64)
    model = apply_lrsa(tiny("llama", num_attention_heads=8, **sizes), LRSAConfig(lag_size=512, **settings))
    model = to_device(model, "cuda").to(torch.bfloat16).train()
    store = enable_checkpointing(model, offload, save_attention)
    ids = torch.randint(0, 101, (1, TOKENS), device="cuda")
    for _ in range(3):
        gc.collect()  # models of earlier tests, and what a compiler holds
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.get_decoder()(ids, use_cache=False).last_hidden_state.float().square().sum().backward()
    torch.cuda.synchronize()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, torch.cuda.max_memory_allocated() - before, store


def test_checkpoints_in_host_memory():
    expected, peak, _ = measured(offload=False)
    found, less, store = measured(offload=True)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-2, name)
    assert store.num_bytes == LAYERS * TOKENS * SIZE * 2
    assert all(buffer.is_pinned() for buffer in store._free) and len(store._free) == LAYERS
    assert peak - less > (LAYERS - 3) * TOKENS * SIZE * 2
    buffers = store._free
    del store
    gc.collect()
    assert not any(buffer.is_pinned() for buffer in buffers)  # their addresses may be used for something else


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("backend,retention", [("flex", 0.25), ("fa4", 0.25), ("auto", 1.0)])
def test_saved_attention_runs_forward_once(monkeypatch, backend, retention, offload):
    """What a kernel saves is found among its inputs and outputs; on the GPU only the outputs stay, one row a layer."""
    if backend != "auto":
        kernel, ran = KERNELS[backend], []
        if reason := kernel.why_not(torch.device("cuda"), torch.bfloat16, 64):
            pytest.skip(reason)
        counted = replace(kernel, attend=lambda *args: ran.append(1) or kernel.attend(*args))
        monkeypatch.setitem(KERNELS._entries, backend, counted)
    settings = dict(backend=backend, retention=retention)
    expected, less, _ = measured(offload, **settings)
    found, peak, store = measured(offload, True, **settings)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-2, name)
    if backend != "auto":
        assert len(ran) == 3 * (2 * LAYERS + LAYERS)
    assert peak - less < (3 if offload else LAYERS + 1) * TOKENS * SIZE * 2
    if store is not None:
        assert LAYERS * TOKENS * SIZE * 4 < store.num_bytes < LAYERS * TOKENS * SIZE * 4 * 1.1
