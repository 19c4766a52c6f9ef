"""Decoding behind a cache of fixed storage on a GPU: the CUDA graph, and the attention in Triton kernels."""

import copy

import pytest
import torch

import lrsa_ds
from lrsa_ds import LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.decoding import attend_entries, rotated, store_and_attend
from lrsa_ds.attention.extras import Extras
from lrsa_ds.models.decoder import Decoder
from lrsa_ds.models.few_rows import can_join, few_rows
from tests.cpu.test_model import tiny
from tests.helpers import assert_close

pytestmark = pytest.mark.gpu
CONFIG = LRSAConfig(sink_size=5, lag_size=64, retention=0.3, backend="chunked")
MIXED = {"0": 1.0, "1": {"retention": 0.0, "lag_size": 40}, "rest": 0.3}
GREEDY = dict(max_new_tokens=150, do_sample=False, pad_token_id=0)


def make(layers=None):
    return apply_lrsa(tiny("qwen2", vocab_size=300, num_hidden_layers=3), CONFIG, layers).cuda()


def tokens(count, batch=1):
    return torch.randint(1, 101, (batch, count), device="cuda")


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 4, 2, 8), (2, 6, 2, 24), (3, 8, 8, 64), (1, 12, 2, 128), (8, 32, 8, 128)])
@pytest.mark.parametrize("size,last", [(1, 0), (65, 3), (700, 699), (5000, 4321)])
def test_kernels_attend_to_the_entries_of_each_row(shape, size, last, dtype, bound):
    batch, heads, kv_heads, dim = shape
    q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, size, dim, device="cuda", dtype=dtype)
    k[:, :, last + 1 :] = v[:, :, last + 1 :] = float("inf")  # never read
    first, place = torch.randint(0, last + 1, (batch,), device="cuda"), torch.tensor([last], device="cuda")
    on_host = (x.cpu().float().nan_to_num(posinf=0.0) for x in (q, k, v))
    expected = attend_entries(*on_host, first.cpu(), place.cpu(), Extras(0.2))
    assert_close(attend_entries(q, k, v, first, place, Extras(0.2)).float(), expected, bound, "output")
    new = [x[:, :, last : last + 1].clone() for x in (k, v)]
    whole = [x.clone() for x in (k, v)]
    angles = torch.randn(batch, 1, 1, dim // 2, device="cuda").repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    # Without a rotation; with that of a first layer, then of one behind it.
    for rotation, is_known in ((None, False), ((cos, sin), False), ((cos, sin), True)):
        if rotation is not None and not is_known:  # back by the angles, so that the kernel arrives where it was
            q, new[0] = (rotated(x.float(), cos, -sin).to(dtype) for x in (q, new[0]))
        k[:, :, last] = v[:, :, last] = float("nan")  # written before it is read
        found = store_and_attend(q, *new, k, v, first, place, Extras(0.2), rotation, is_known).float()
        assert_close(found, expected, 2 * bound, "output")
        assert_close(k[:, :, last].float(), whole[0][:, :, last].float(), 0.0 if rotation is None else bound, "key")
        k[:, :, last] = whole[0][:, :, last]
        assert torch.equal(k, whole[0]) and torch.equal(v, whole[1])


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("sizes,gated", [((16,), False), ((1536, 256, 256), False), ((8960, 8960), True)])
def test_products_of_few_rows(num_rows, sizes, gated, dtype, bound):
    for channels in (1536, 40):
        x = torch.randn(num_rows, 1, channels + 8, device="cuda", dtype=dtype)[..., :channels]
        weights = [torch.randn(size, channels, device="cuda", dtype=dtype) / channels**0.5 for size in sizes]
        for biases in ([], [torch.randn(size, device="cuda", dtype=dtype) for size in sizes])[: 1 if gated else 2]:
            assert can_join(x, [*weights, *biases][:: len(weights)])
            on_host = (x.cpu().double(), [w.cpu().double() for w in weights], [b.cpu().double() for b in biases])
            expected = few_rows(*on_host, gated)
            found = few_rows(x, weights, biases, gated)
            assert_close(found.cpu().double(), expected, bound, "output")
            behind = torch.randn(300, channels, device="cuda", dtype=dtype)
            assert torch.equal(few_rows(x, weights, biases, gated, behind=behind), found)


@pytest.mark.parametrize(
    "layers,lengths,compiles",
    [(layers, lengths, False) for layers in (None, MIXED) for lengths in ((300,), (300, 300), (300, 120, 9))]
    + [(MIXED, lengths, True) for lengths in ((300,), (300, 120, 9))],
)
def test_a_graph_gives_the_logits_of_training(layers, lengths, compiles):
    model, ids = make(layers), tokens(500, len(lengths))
    mask = torch.arange(300, device="cuda") >= 300 - torch.tensor(lengths, device="cuda")[:, None]
    cache, found = new_cache(model, max_tokens=500), []
    prefill(model, ids[:, :300], cache, attention_mask=mask)
    decoder = Decoder(model, captures=True, compiles=compiles)
    decoder.start(cache)
    for column in ids[:, 300:].T:
        found.append(decoder(cache, column).clone())
        decoder.end_step(cache)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model(ids[row : row + 1, 300 - length :], use_cache=False).logits[0, length:]
        assert_close(torch.stack(found, dim=1)[row], expected, 1e-4, f"row {row}")


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, temperature=0.8, top_p=0.9)])
def test_answers_through_a_graph(options):
    """With the growing cache of `model.generate`, without a graph, and again behind the same cache."""
    model, ids = make(), tokens(300)
    model.generation_config.eos_token_id = list(range(3))
    cache, options = new_cache(model, max_tokens=460), GREEDY | options

    def seeded(generate, *args, **more):
        torch.manual_seed(7)
        return generate(*args, **options, **more)

    expected = seeded(model.generate, ids)
    assert torch.equal(seeded(lrsa_ds.generate, model, ids, graph=False), expected)
    assert torch.equal(seeded(lrsa_ds.generate, model, ids, cache), expected)
    graph = cache.decoder._graph
    cache.reset()
    assert torch.equal(seeded(lrsa_ds.generate, model, ids, cache), expected)
    assert graph is not None and cache.decoder._graph is graph
    text = torch.cat([expected, tokens(5)], dim=1)[:, :440]
    copied, options = copy.deepcopy(cache), options | dict(max_new_tokens=9)
    if cache.get_seq_length() < text.shape[1]:
        assert torch.equal(
            seeded(lrsa_ds.generate, model, text, cache), seeded(lrsa_ds.generate, model, text, copied, graph=False)
        )


def test_a_graph_in_bf16_behind_a_long_prompt():
    config = LRSAConfig(sink_size=16, lag_size=256, retention=0.125)
    model = apply_lrsa(tiny("llama", hidden_size=256, num_hidden_layers=4), config).cuda().bfloat16()
    ids = tokens(6000)
    found = lrsa_ds.generate(model, ids, max_new_tokens=300, do_sample=False)
    with torch.no_grad():
        best = model(found, use_cache=False).logits[:, 5999:-1].float()
    chosen = best.gather(2, found[:, 6000:, None])[..., 0]
    assert (
        best.amax(-1) - chosen
    ).max() <= 0.3 * best.std()  # what bf16 rounds away; any other token is some deviations off
