"""Models with layers of other kinds on a GPU: recurrent ones, and those that share the keys of an earlier layer."""

from dataclasses import replace

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.decoder import Decoder
from lrsa_ds.models.patch import enable_checkpointing
from tests.cpu.test_shared_keys import gradients

pytestmark = pytest.mark.gpu
CONFIG = LRSAConfig(sink_size=3, lag_size=16, retention=0.25, backend="chunked")
RECURRENT = ("qwen3_next", "qwen3_5_text", "lfm2", "jamba", "bamba", "falcon_h1", "nemotron_h")
PACKED = dict(document_lengths=(900, 148))
# Heads and partitions of sizes that the kernels take.
SHARED_KEYS = {
    "gemma3n_text": dict(head_dim=64, hidden_size=128, sliding_window=256, max_position_embeddings=2048),
    "gemma4_text": dict(
        head_dim=64, global_head_dim=64, hidden_size=128, sliding_window=256, max_position_embeddings=2048
    ),
}


@pytest.mark.parametrize("family", [*RECURRENT, *SHARED_KEYS])
def test_a_graph_gives_the_logits_of_training(family):
    # Passes with grouped products of experts in fp32 could not be captured, nor those of Gemma 3n.
    model = apply_lrsa(tiny_model(family, experts_implementation="batched_mm"), CONFIG).cuda()
    captures, ids = family != "gemma3n_text", torch.randint(4, 100, (2, 100), device="cuda")
    cache, found = new_cache(model, max_tokens=100), []
    prefill(model, ids[:, :60], cache)
    decoder = Decoder(model, captures=captures)
    decoder.start(cache)
    for column in ids[:, 60:].T:
        found.append(decoder(cache, column).clone())
        decoder.end_step(cache)
    decoder.finish(cache)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 60:]
    assert (torch.stack(found, dim=1) - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("family", SHARED_KEYS)
def test_gradients_of_shared_keys_on_a_kernel(family):
    """Of packed documents, with recomputed layers and saved attention, against the readable form."""
    config, ids = replace(CONFIG, lag_size=128), torch.randint(4, 100, (1, 1048), device="cuda")
    expected = gradients(apply_lrsa(tiny_model(family, **SHARED_KEYS[family]), config).cuda(), ids, **PACKED)
    model = apply_lrsa(tiny_model(family, **SHARED_KEYS[family]), replace(config, backend="flex"))
    enable_checkpointing(model.cuda().train(), save_attention=True)
    found = gradients(model, ids, **PACKED)
    # A gradient that is nearly zero is measured against the largest one.
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / max(gradient.norm(), 0.05 * largest)
        assert error <= 1e-3, (name, float(error))
