"""Extras of attention: caps, learned sinks, values of another head dim. Every path against whole score matrices."""

import pytest
import torch
from transformers import DynamicCache

from lrsa_ds import LRSAConfig, apply_lrsa, lrsa_attention, new_cache, prefill
from lrsa_ds.attention.buffered import buffered_attention
from lrsa_ds.attention.cached import cached_attention, cached_attention_on
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kept_buffer import buffer_positions
from lrsa_ds.attention.kernels.flex import flex_interval_attention
from lrsa_ds.attention.kernels.interval import Intervals, interval_attention
from lrsa_ds.attention.kernels.kernel import choose_kernel
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.attention.ragged import Rows, pack_rows, ragged_attention
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.cache import LagKVLayer
from lrsa_ds.models.heads import head_dims, num_kv_heads
from lrsa_ds.registry import KERNELS
from lrsa_ds.telemetry.answers import Answer
from lrsa_ds.telemetry.probe import RetentionProbe
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
DENSE = LRSAConfig(sink_size=2, lag_size=8, retention=1.0)
LENGTHS = (37, 5, 60)
DIMS = [(8, 8), (12, 8), (8, 12)]
HEADS, KV_HEADS = 4, 2


def inputs_of(num_tokens, key_dim=8, value_dim=8):
    shapes = [(HEADS, key_dim), (KV_HEADS, key_dim), (KV_HEADS, value_dim)]
    return [torch.randn(1, heads, num_tokens, dim).double().requires_grad_() for heads, dim in shapes]


def extras_of(kind):
    sinks = torch.linspace(-1, 2, HEADS).double().requires_grad_()
    return {"capped": Extras(0.5, 1.5), "sinks": Extras(None, None, sinks), "both": Extras(0.4, 2.0, sinks)}[kind]


def by_definition(q, k, v, extras):
    """Every query over what it sees of whole matrices, the sinks as a column of the softmax without a value."""
    table = partition_table(LENGTHS, CONFIG)
    seen = torch.zeros(KV_HEADS, sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    positions = buffer_positions(k, v, table, 0)[0]
    for chunk in table.chunks:
        rows = torch.arange(chunk.q_lo, chunk.q_hi)
        for head in range(KV_HEADS):
            seen[head, rows[:, None], positions[head, chunk.hist_lo : chunk.hist_hi]] = True
        for row in rows:
            seen[:, row, chunk.win_lo : row + 1] = True
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if extras.scale is None else extras.scale)
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    scores = scores.masked_fill(~seen.repeat_interleave(HEADS // KV_HEADS, dim=0), -torch.inf)
    if extras.sinks is not None:
        column = extras.sinks[:, None, None].expand(1, HEADS, scores.shape[2], 1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def assert_same(actual, expected, inputs):
    upstream = torch.randn_like(expected)
    assert_close(actual, expected, 1e-6, "output")
    pairs = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (actual, expected))
    for number, (got, wanted) in enumerate(zip(*pairs, strict=True)):
        assert_close(got, wanted, 1e-5, f"gradient {number}")


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("kind", ["capped", "sinks", "both"])
def test_every_path_of_a_whole_sequence_is_the_definition(kind, dims):
    tensors, extras = inputs_of(sum(LENGTHS), *dims), extras_of(kind)
    parts = tensors if extras.sinks is None else [*tensors, extras.sinks]
    expected = by_definition(*tensors, extras)
    assert_same(lrsa_attention(*tensors, CONFIG, LENGTHS, extras=extras), expected, parts)
    assert_same(chunked_attention(*tensors, partition_table(LENGTHS, CONFIG), extras), expected, parts)
    assert_same(buffered_attention(*tensors, CONFIG, LENGTHS, extras, KERNELS["chunked"]), expected, parts)


@pytest.mark.parametrize("dims", DIMS)
def test_plain_attention_takes_values_of_another_head_dim(dims):
    tensors = inputs_of(sum(LENGTHS), *dims)
    expected = by_definition(*tensors, PLAIN)
    assert_same(lrsa_attention(*tensors, CONFIG, LENGTHS), expected, tensors)
    assert_same(buffered_attention(*tensors, CONFIG, LENGTHS, PLAIN, KERNELS["chunked"]), expected, tensors)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("kind", ["capped", "both"])
def test_flex_caps_scores(kind, dims):
    """Forward only: FlexAttention has no backward on the CPU. Its gradients are compared in tests/gpu."""
    q, k, v = (x.detach().float() for x in inputs_of(200, *dims))
    intervals = Intervals(torch.arange(200, dtype=torch.int32) // 3, torch.arange(1, 201, dtype=torch.int32))
    extras = extras_of(kind)
    actual, expected = (attend(q, k, v, intervals, extras) for attend in (flex_interval_attention, interval_attention))
    assert_close(actual[0], expected[0], 1e-5, "output")
    assert_close(actual[1], expected[1], 1e-5, "log-sum-exp")


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("kind", ["capped", "both"])
@torch.no_grad()
def test_behind_a_cache(kind, dims):
    """Tokens in parts of several sizes, on one row and on rows that differ, against one pass."""
    extras = extras_of(kind)
    q, k, v = inputs_of(70, *dims)
    expected = lrsa_attention(q, k, v, CONFIG, extras=extras)
    layer, ragged, seen = LagKVLayer(CONFIG), [LagKVLayer(CONFIG) for _ in range(2)], 0
    for size in (13, 1, 30, 1, 25):
        part = slice(seen, seen + size)
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        assert layer.values.shape[3] == dims[1]
        found = cached_attention(q[:, :, part], keys, values, seen, CONFIG, extras)
        assert_close(found, expected[:, :, part], 1e-6, "output")
        found = cached_attention_on(KERNELS["chunked"], q[:, :, part], keys, values, seen, CONFIG, extras)
        assert_close(found, expected[:, :, part], 1e-6, "output of a kernel")
        # The second row is one token behind.
        places = [slice(seen, seen + size), slice(max(0, seen - 1), seen + size - 1)]
        lengths = [p.stop - p.start for p in places]
        states = [one.update(k[:, :, p], v[:, :, p]) for one, p in zip(ragged, places, strict=True)]
        held = [pack_rows([state[i] for state in states]) for i in range(2)]
        columns = [torch.arange(size - n, size) for n in lengths]
        rows = Rows(tuple(p.start for p in places), tuple(columns), size)
        queries = pack_rows([q[:, :, p] for p in places])
        both = ragged_attention(queries, *held, rows, CONFIG, extras)
        for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
            assert_close(both[row : row + 1, :, size - length :], expected[:, :, place], 1e-6, f"row {row}")
        seen += size


def test_what_a_kernel_takes():
    cuda, half = torch.device("cuda"), torch.bfloat16
    fa4, flex = KERNELS["fa4"], KERNELS["flex"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr("lrsa_ds.attention.kernels.fa4._installed_release", lambda: "4.0.0b36")
        assert fa4.why_not(cuda, half, 128) is None
        assert "values of the head dim of the keys, 128, not 64" in fa4.why_not(cuda, half, 128, 64)
        assert "cannot cap" in fa4.why_not(cuda, half, 128, 128, True)
        sinks = Extras(None, None, torch.zeros(4))
        assert choose_kernel(CONFIG, cuda, half, 128, extras=sinks) is fa4
        for has_history in (True, False):  # the readable one would hold all scores
            assert (
                choose_kernel(CONFIG, cuda, half, 192, has_history, value_dim=128, extras=Extras(softcap=50.0)) is flex
            )
    with pytest.raises(LRSAError, match="give scale, or extras"):
        lrsa_attention(*inputs_of(20), CONFIG, scale=0.1, extras=PLAIN)


FULL = dict(layer_types=["full_attention"] * 2)
MODELS = {
    "gemma2": FULL | dict(attn_logit_softcapping=0.8, final_logit_softcapping=2.0, query_pre_attn_scalar=3),
    "gpt_oss": FULL,
    "flint": FULL,
    "granite": dict(attention_multiplier=0.7),
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_model_with_extras(family):
    """Dense it is the stock model; compressed, its training pass is prefill and decoding."""
    model, ids = tiny_model(family, **MODELS[family]), torch.randint(4, 100, (1, 70))
    expected = model(ids, use_cache=False).logits
    assert_close(apply_lrsa(model, CONFIG)(ids, lrsa_config=DENSE, use_cache=False).logits, expected, 1e-5, "dense")
    trained = model(ids, use_cache=False).logits
    assert (trained - expected).norm() > 1e-3 * expected.norm()
    cache = new_cache(model)
    assert_close(prefill(model, ids[:, :58], cache), trained[:, 57], 1e-4, "prefill")
    for token in range(58, 70):
        logits = model(ids[:, token : token + 1], past_key_values=cache).logits[:, 0]
        assert_close(logits, trained[:, token], 1e-4, "decoding")


def test_sinks_get_the_gradient_of_the_stock_model():
    model, ids = tiny_model("gpt_oss", **FULL), torch.randint(4, 100, (1, 40))
    sinks = [parameter for name, parameter in model.named_parameters() if name.endswith("sinks")]
    torch.nn.init.normal_(sinks[0])
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, sinks))
        apply_lrsa(model, DENSE)
    for actual, expected in zip(*found, strict=True):
        assert expected.norm() > 0
        assert_close(actual, expected, 1e-4, "gradient of the sinks")


LATENT = {"deepseek_v2": (12, 8), "deepseek_v3": (12, 8), "minicpm3": (12, 8)}


@pytest.mark.parametrize("family", LATENT)
@torch.no_grad()
def test_latent_attention_keeps_the_keys_and_values_of_its_heads(family):
    model, ids = apply_lrsa(tiny_model(family), CONFIG), torch.randint(4, 100, (2, 70))
    apply_lrsa(model, CONFIG)  # twice: the cache is deferred once
    expected = model(ids, use_cache=False).logits
    for options in ({}, {"max_tokens": 70}):
        cache = new_cache(model, **options)
        assert_close(prefill(model, ids[:, :69], cache), expected[:, 68], 1e-4, "prefill")
        assert_close(model(ids[:, 69:], past_key_values=cache).logits[:, 0], expected[:, 69], 1e-4, "decoding")
        heads = model.config.num_attention_heads
        assert [x.shape[:2] for x in (cache.layers[0].keys, cache.layers[0].values)] == [(2, heads)] * 2
        assert (cache.layers[0].keys.shape[3], cache.layers[0].values.shape[3]) == LATENT[family]
        assert head_dims(model.config) == LATENT[family] and num_kv_heads(model.config) == heads
        if not options:
            assert cache.num_bytes == 2 * 2 * heads * sum(LATENT[family]) * cache.num_held * 4
    # The stock attention and cache of the model are as they were.
    model.set_attn_implementation("sdpa")
    with pytest.raises(LRSAError, match="serves models with LRSA attention"):
        model(ids, past_key_values=new_cache(model))
    dense, stock = model(ids, use_cache=False).logits, DynamicCache()
    model(ids[:, :69], past_key_values=stock)
    assert stock.layers[0].keys.shape[1] == 1
    assert_close(model(ids[:, 69:], past_key_values=stock).logits[:, 0], dense[:, 69], 1e-4, "stock cache")


@torch.no_grad()
def test_latent_attention_generates_with_padding():
    model = apply_lrsa(tiny_model("deepseek_v3"), CONFIG)
    ids = torch.randint(4, 100, (1, 60))
    short = ids[:, -33:]
    alone = [model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, -8:] for x in (ids, short)]
    padded = torch.cat([ids, torch.cat([torch.zeros(1, 27, dtype=torch.int64), short], dim=1)])
    both = model.generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert [row[-8:].tolist() for row in both] == [row.tolist() for row in alone]


def test_the_probe_counts_capped_scores_and_sinks():
    q, k, v = inputs_of(45)
    extras, answer = extras_of("both"), Answer(first=38, start=0, end=45, places=())
    probe = RetentionProbe(CONFIG)
    probe.answers = [answer]
    probe(q, k, v, DENSE, extras=extras)
    table = partition_table((45,), CONFIG)
    kept = torch.zeros(KV_HEADS, 45, dtype=torch.bool).scatter_(1, buffer_positions(k, v, table, 0)[0], True)
    scores = extras.softcap * torch.tanh((q @ k.repeat_interleave(2, dim=1).mT)[0] * extras.scale / extras.softcap)
    scores = scores.masked_fill(torch.ones(45, 45).triu(1).bool(), -torch.inf)
    column = extras.sinks[:, None, None].expand(HEADS, 45, 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[:, 38:, :-1]
    outside = torch.arange(45) < table.intervals()[2][38:, None]
    dropped = (weights * outside * ~kept.repeat_interleave(2, dim=0)[:, None]).sum((1, 2)).view(KV_HEADS, 2).mean(1)
    assert dropped.min() > 0.01
    assert_close(probe.sums[0][:KV_HEADS], dropped, 1e-5, "dropped mass")
