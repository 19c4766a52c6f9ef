"""Layers of chunked attention (Llama 4) beside LRSA, and layers that keep the keywords of a pass to themselves."""

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa, new_cache
from lrsa_ds.attention import layer_attention
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.interval import interval_attention
from lrsa_ds.attention.kinds.chunked_attention import ChunkedAttention
from lrsa_ds.attention.kinds.local import cached_local_attention, cached_local_attention_on, document_intervals
from lrsa_ds.attention.partition import num_held
from lrsa_ds.costs.flops import seen_pairs
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.layers import describe, in_model
from lrsa_ds.models.patch import enable_checkpointing
from lrsa_ds.models.structure import layers_of
from lrsa_ds.registry import KERNELS
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache, tokens
from tests.cpu.test_decoding import cache_of_padded_rows
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
SIZE = 16


@pytest.fixture(scope="module")
def model():
    return apply_lrsa(tiny_model("llama4_text"), CONFIG)


@pytest.mark.parametrize("steps", STEPS)
def test_logits_are_those_of_training(model, steps):
    ids = tokens(83)
    for count in (83, 80, 79):  # 80: an attention chunk has just ended, and its successor sees nothing of it
        cache = new_cache(model)
        actual = logits_with_cache(model, ids[:, :count], cache, STEPS[steps](CONFIG))
        assert (actual - logits_of_training(model, ids[:, :count])).abs().max() <= 1e-4
        assert [layer.num_held for layer in cache.layers] == [count % SIZE, num_held(count, CONFIG)]


def test_steps_behind_a_fixed_storage(model):
    cache_of_padded_rows(apply_lrsa(tiny_model("nemotron"), CONFIG))
    cache = cache_of_padded_rows(model)
    assert cache.layers[0].storage[0].shape[2] == SIZE


def test_what_a_token_sees():
    """Documents count their attention chunks from their own first token; kernels get the same."""
    lengths, config = (50, 1, 70), ChunkedAttention(size=SIZE)
    place = torch.cat([torch.arange(n) for n in lengths])
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    seen = (document[:, None] == document) & (place[:, None] >= place) & (place[:, None] // SIZE == place // SIZE)
    q, k, v = inputs = [torch.randn(1, heads, 121, 8, requires_grad=True) for heads in (4, 2, 2)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    intervals = document_intervals(lengths, config, torch.device("cpu"))
    found = layer_attention(q, k, v, config, lengths, 0.3), interval_attention(q, k, v, intervals, Extras(0.3))[0]
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    for actual in found:
        assert_close(actual, expected, 1e-5)
        for one, other in zip(torch.autograd.grad(actual, inputs, upstream), gradients, strict=True):
            assert_close(one, other, 1e-5, "gradient")
    behind = [torch.randn(1, heads, config.num_held(200) * (heads < 4) + 130, 8) for heads in (4, 2, 2)]
    actual = cached_local_attention_on(KERNELS["chunked"], *behind, 200, config)
    assert_close(actual, cached_local_attention(*behind, 200, config), 1e-5)


def test_attention_chunks_count_as_what_they_are(model):
    settings = in_model(CONFIG, layers_of(model.config))
    assert describe(settings) == "layers 0 attention chunks of 16 tokens, 1 retention 0.3"
    of_chunk = sum(t % SIZE + 1 for length in (50, 30) for t in range(length))
    assert seen_pairs((50, 30), settings, 2)[0] == of_chunk
    with pytest.raises(LRSAError, match="attention_chunk_size"):
        ChunkedAttention(size=0)


@pytest.mark.parametrize("family", ["llama4_text", "nemotron"])
def test_packed_documents_reach_layers_that_are_recomputed(family):
    """Also where a layer does not hand on its keywords, or counts the tokens of the pass as positions."""
    lengths = (50, 7, 41)
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model = apply_lrsa(apply_lrsa(tiny_model(family), CONFIG), CONFIG).train()  # hooks are there once

    def gradients(*passes):
        loss = sum(model(part, use_cache=False, **said).logits.square().sum() for part, said in passes)
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)

    alone = gradients(*((part, {}) for part in ids.split(lengths, 1)))
    enable_checkpointing(model)
    packed = gradients((ids, dict(position_ids=positions)))
    for one, other in zip(packed, alone, strict=True):
        assert_close(one, other, 1e-5, "gradient")
    model.set_attn_implementation("sdpa")
    stock = tiny_model(family)
    with torch.no_grad():
        assert_close(model(ids).logits, stock(ids).logits, 1e-6, "logits of the stock attention")
