"""The chunked backend against a dense masked softmax written from the definition, and every property of selection."""

import pytest
import torch

from lrsa_ds import LRSAConfig, lrsa_attention, select_kept
from lrsa_ds.attention.buffered import buffered_attention, buffered_layout, select_and_gather
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.extras import PLAIN
from lrsa_ds.attention.kernels import blocks
from lrsa_ds.attention.kernels.blocks import BLOCK, block_cover, interval_rows
from lrsa_ds.attention.kernels.fa4 import RELEASE
from lrsa_ds.attention.kernels.flex import _block_mask
from lrsa_ds.attention.kernels.interval import Ahead, interval_attention
from lrsa_ds.attention.partition import _build as layout_of
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.errors import LRSAError
from lrsa_ds.registry import KERNELS
from tests.helpers import ROOT, assert_close


def random_qkv(num_tokens, heads=4, kv_heads=2, dim=16, batch=1, dtype=torch.float32):
    shapes = [(batch, heads, num_tokens, dim)] + 2 * [(batch, kv_heads, num_tokens, dim)]
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def reference_selection(k, v, config):
    """Kept positions of one document and one head [N, D], token by token, from LagKV's equations."""
    kept = []
    num_complete = (len(k) - config.sink_size) // config.lag_size
    for p in range(num_complete - 1):
        start = config.sink_size + p * config.lag_size
        here, after = slice(start, start + config.lag_size), slice(start + config.lag_size, start + 2 * config.lag_size)
        score = 0
        for z in (k, v):
            low, high = z[after].min(0).values, z[after].max(0).values
            score = score + ((z[here] - low) / (high - low)).std(-1).softmax(0)
        order = sorted(range(config.lag_size), key=lambda i: (-score[i].item(), i))
        kept.append(sorted(start + i for i in order[: config.num_kept]))
    return kept


def reference_attention(q, k, v, config, lengths):
    """Dense attention under a mask that follows the definition of sink, history and window literally."""
    batch, heads, num_tokens, dim = q.shape
    group = heads // k.shape[1]
    sink, lag = config.sink_size, config.lag_size
    mask = torch.zeros(batch, k.shape[1], num_tokens, num_tokens, dtype=torch.bool)
    start = 0
    for length in lengths:
        document = slice(start, start + length)
        for b in range(batch):
            for g in range(k.shape[1]):
                kept = reference_selection(k[b, g, document].detach(), v[b, g, document].detach(), config)
                for t in range(length):
                    chunk = (t - sink) // lag if t >= sink else -1
                    visible = set(range(min(sink, t + 1)))
                    for p in range(max(0, chunk - 1)):
                        visible |= set(kept[p])
                    visible |= {s for s in range(max(0, sink + (chunk - 1) * lag), t + 1) if chunk >= 0}
                    mask[b, g, start + t, [start + s for s in visible]] = True
        start += length
    scores = q @ k.repeat_interleave(group, 1).mT / dim**0.5
    scores = scores.masked_fill(~mask.repeat_interleave(group, 1), -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


def assert_same_function(actual, expected, inputs, tolerance):
    """Forward and every gradient agree, for a random upstream gradient."""
    assert_close(actual, expected, tolerance, "output")
    upstream = torch.randn_like(expected)
    gradients = zip(
        torch.autograd.grad(actual, inputs, upstream.to(actual.dtype)),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    )
    for name, (a, e) in zip("qkv", gradients, strict=True):
        assert_close(a, e, tolerance, f"gradient of {name}")


LAYOUTS = [
    dict(lengths=(97,), sink_size=3, lag_size=8, retention=0.5),
    dict(lengths=(64,), sink_size=0, lag_size=8, retention=0.25),
    dict(lengths=(20, 61, 1, 35), sink_size=4, lag_size=7, retention=0.3),
    dict(lengths=(19, 20, 21), sink_size=4, lag_size=8, retention=0.5),  # S+2L-1, S+2L, S+2L+1
    dict(lengths=(2, 50), sink_size=5, lag_size=6, retention=0.9),
    dict(lengths=(5, 9), sink_size=16, lag_size=8, retention=0.5),  # shorter than the sink
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads,kv_heads,batch", [(4, 2, 1), (3, 1, 2), (2, 2, 1)])
def test_chunked_follows_the_definition(layout, heads, kv_heads, batch):
    lengths = layout["lengths"]
    config = LRSAConfig(**{key: value for key, value in layout.items() if key != "lengths"}, backend="chunked")
    inputs = random_qkv(sum(lengths), heads, kv_heads, batch=batch, dtype=torch.float64)
    actual = lrsa_attention(*inputs, config, document_lengths=lengths)
    assert_same_function(actual, reference_attention(*inputs, config, lengths), inputs, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_is_the_same_function(layout):
    """Forward only: FlexAttention has no backward on the CPU. Its gradients are compared in tests/gpu."""
    lengths = layout["lengths"]
    config = LRSAConfig(**{key: value for key, value in layout.items() if key != "lengths"})
    inputs = [x.detach() for x in random_qkv(sum(lengths))]
    expected = chunked_attention(*inputs, partition_table(lengths, config))
    actual = buffered_attention(*inputs, config, lengths, PLAIN, KERNELS["flex"])
    assert_close(actual, expected, 1e-5, "output")


@pytest.fixture(params=[1, 128, 256, 10**9])
def queries_a_copy(request, monkeypatch):
    """Queries that read one copy of their history: from as few as can be to all of a sequence."""
    monkeypatch.setattr(blocks, "queries_a_copy", lambda table: request.param)
    monkeypatch.setattr(blocks, "LEAST_TOKENS_AHEAD", 0)
    buffered_layout.cache_clear()
    yield request.param
    buffered_layout.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_history_and_window_are_two_intervals(layout, queries_a_copy):
    """With the readable kernel: the kept buffer, its copies, gaps and padding change nothing, backward neither."""
    lengths = layout["lengths"]
    config = LRSAConfig(**{key: value for key, value in layout.items() if key != "lengths"})
    inputs = random_qkv(sum(lengths), 4, 2)
    actual = buffered_attention(*inputs, config, lengths, PLAIN, KERNELS["chunked"])
    assert_same_function(actual, chunked_attention(*inputs, partition_table(lengths, config)), inputs, 1e-5)


@pytest.mark.parametrize("lengths", [(3000,), (1000, 17, 1500, 483), (100, 120, 130, 2000, 5), (513,)])
@pytest.mark.parametrize("lag_size,retention,sink_size", [(128, 0.5, 16), (100, 0.33, 7), (256, 0.125, 0)])
def test_block_mask_covers_exactly(lengths, lag_size, retention, sink_size, queries_a_copy):
    """Every block with a visible pair is listed, and no block listed as full holds an invisible pair."""
    config = LRSAConfig(sink_size=sink_size, lag_size=lag_size, retention=retention)
    layout = buffered_layout(lengths, config, torch.device("cpu"))
    buffer_size, num_tokens = layout.copies.size, sum(lengths)
    mask = _block_mask(layout.intervals, num_tokens, buffer_size + num_tokens)
    q, kv = torch.arange(num_tokens)[:, None], torch.arange(buffer_size + num_tokens)[None]
    visible = mask.mask_mod(0, 0, q, kv)
    visible = torch.nn.functional.pad(visible, (0, -visible.shape[1] % BLOCK, 0, -num_tokens % BLOCK))
    blocks = visible.view(visible.shape[0] // BLOCK, BLOCK, -1, BLOCK)

    def listed(counts, columns):
        dense = torch.zeros(blocks.shape[0], blocks.shape[2], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0]):
            dense[row, columns[0, 0, row, :count].long()] = True
        return dense

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert not (blocks.any(dim=3).any(dim=1) & ~(partial | full)).any()
    for row, column in full.nonzero():
        rows = min(BLOCK, num_tokens - row * BLOCK)
        columns = min(BLOCK, buffer_size + num_tokens - column * BLOCK)
        assert blocks[row, :rows, column, :columns].all()


def test_one_long_document_meets_mostly_full_blocks():
    """The alignment of the kept buffer is worth its gaps: the history is nearly free of partly covered blocks."""
    config = LRSAConfig(sink_size=16, lag_size=1024, retention=0.125)
    layout = buffered_layout((16384,), config, torch.device("cpu"))
    mask = _block_mask(layout.intervals, 16384, layout.copies.size + 16384)
    # The block with the sink and both borders of the window; more only where two chunks meet, in one block of eight.
    assert (mask.kv_num_blocks <= 3).float().mean() >= 7 / 8


@pytest.mark.parametrize("lengths,ahead", [((4000,), 16), ((700, 2500, 600), (700 + 16) % BLOCK)])
def test_blocks_may_begin_where_the_chunks_of_the_longest_document_do(lengths, ahead, queries_a_copy):
    """The function stays, the queries ahead see each other alone, and all blocks are seen in full but for two a row."""
    config = LRSAConfig(sink_size=16, lag_size=256, retention=0.5)
    layout = buffered_layout(lengths, config, torch.device("cpu"), skips_queries_ahead=True)
    window, first_key = layout.intervals.also, layout.copies.size
    assert layout.intervals.ahead == Ahead(ahead, first_key) and (first_key + ahead) % BLOCK == 0
    assert (window.lo[:ahead] >= first_key).all() and (window.hi[:ahead] <= first_key + ahead).all()
    assert (layout.intervals.lo[:ahead] == layout.intervals.hi[:ahead]).all()
    q, k, v = random_qkv(sum(lengths))
    actual, _ = interval_attention(q, *select_and_gather(k, v, layout), layout.intervals, PLAIN)
    assert_same_function(actual, chunked_attention(q, k, v, partition_table(lengths, config)), (q, k, v), 1e-5)
    partly, wholly = block_cover(interval_rows(layout.intervals, ahead), layout.copies.size + sum(lengths))
    # The block with the sink and the last one of the window.
    longest = slice(0, None) if len(lengths) == 1 else slice(-(-(700 - ahead) // BLOCK), (3200 - ahead) // BLOCK)
    assert partly[longest].sum(dim=1).max() <= 2 and wholly[longest].any()


def test_blocks_of_fewer_keys_cover_what_blocks_of_more_cover():
    layout = buffered_layout((900, 77), LRSAConfig(sink_size=5, lag_size=64, retention=0.3), torch.device("cpu"))
    rows, num_keys = interval_rows(layout.intervals), layout.copies.size + 977
    a_lo, a_hi, b_lo, b_hi = rows[:, :, None]
    keys = torch.arange(-(-num_keys // BLOCK) * BLOCK)
    seen = ((keys >= a_lo) & (keys < a_hi)) | ((keys >= b_lo) & (keys < b_hi))
    for size in (BLOCK, 64):
        partly, wholly = block_cover(rows, num_keys, size)
        blocks = seen.view(rows.shape[1] // BLOCK, BLOCK, -1, size)[:, :, : partly.shape[1]]
        assert not blocks.any(dim=3).any(dim=1)[~(partly | wholly)].any()
        assert blocks.all(dim=3).all(dim=1)[wholly].all() and wholly.any()


@pytest.mark.parametrize("num_tokens,ahead", [(8192, 0), (16384, 16)])
def test_short_sequences_have_no_queries_ahead(num_tokens, ahead):
    config = LRSAConfig(sink_size=16, lag_size=1024, retention=0.125)
    layout = buffered_layout((num_tokens,), config, torch.device("cpu"), skips_queries_ahead=True)
    assert layout.intervals.ahead.count == ahead


def test_no_query_reads_a_copy_that_is_not_its_own(queries_a_copy):
    lengths, config = (1000, 3000, 96), LRSAConfig(sink_size=16, lag_size=128, retention=0.25)
    layout = buffered_layout(lengths, config, torch.device("cpu"))
    wanted, _, _ = layout.table.intervals()
    slots, offsets = layout.copies.slots(torch.device("cpu")), layout.copies.offsets()
    assert len(slots) == layout.copies.size and len(offsets) == {1: 8, 128: 8, 256: 8}.get(queries_a_copy, 1)
    seen = [(lo, hi) for lo, hi in zip(layout.intervals.lo.tolist(), layout.intervals.hi.tolist(), strict=True)]
    for query in range(0, sum(lengths), 37):
        lo, hi = seen[query]
        if lo < hi:
            part = sum(offset <= lo for offset in offsets) - 1
            assert hi <= (*offsets, layout.copies.num_copied)[part + 1]
            assert slots[lo] == wanted[query] and (slots[lo:hi].diff() == 1).all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype, tolerance):
    config = LRSAConfig(sink_size=4, lag_size=16, retention=0.25, backend="chunked")
    inputs = [x.detach().to(dtype).requires_grad_() for x in random_qkv(150)]
    output = lrsa_attention(*inputs, config)
    assert output.dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(output, reference_attention(*wide, config, (150,)), tolerance, "output")


def test_under_autocast_all_are_cast_as_for_the_attention_of_torch():
    """A rotary embedding gives fp32 queries and keys there, and a linear layer bf16 values."""
    config = LRSAConfig(sink_size=4, lag_size=16, retention=0.25, backend="chunked")
    inputs = random_qkv(150)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = lrsa_attention(*low, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = lrsa_attention(inputs[0], inputs[1], inputs[2].bfloat16(), config)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    expected.float().square().sum().backward()
    actual.float().square().sum().backward()
    for given, cast in zip(inputs, low, strict=True):
        assert given.grad.dtype == torch.float32
        assert_close(given.grad, cast.grad.float(), 1e-6, "gradient")


def test_retention_one_is_dense_attention():
    config = LRSAConfig(sink_size=4, lag_size=8, retention=1.0)
    inputs = random_qkv(77, dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert_same_function(lrsa_attention(*inputs, config), dense, inputs, 1e-10)


def test_keeping_all_through_the_history_is_dense_attention():
    """The path over the kept buffer, too, is dense attention when K equals L."""
    everything = layout_of((77,), LRSAConfig(sink_size=4, lag_size=8, retention=1.0), align=1, is_dense=False)
    inputs = random_qkv(77, dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert_same_function(chunked_attention(*inputs, everything), dense, inputs, 1e-10)


def test_short_documents_are_dense():
    config = LRSAConfig(sink_size=4, lag_size=16, retention=0.25)
    inputs = random_qkv(36, dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert_same_function(lrsa_attention(*inputs, config), dense, inputs, 1e-10)


def test_documents_do_not_see_each_other():
    config = LRSAConfig(sink_size=2, lag_size=8, retention=0.5)
    lengths = (40, 13, 51)
    inputs = random_qkv(sum(lengths))
    packed = lrsa_attention(*inputs, config, document_lengths=lengths)
    alone = [lrsa_attention(*parts, config) for parts in zip(*(x.split(lengths, 2) for x in inputs), strict=True)]
    assert_close(packed, torch.cat(alone, 2), 1e-6, "output")


def test_selected_positions():
    config = LRSAConfig(sink_size=3, lag_size=10, retention=0.35)
    _, k, v = random_qkv(58, kv_heads=3, batch=2, dtype=torch.float64)
    kept = select_kept(k, v, config)
    assert kept.shape == (2, 3, 4, 3) and kept.dtype == torch.int64 and not kept.requires_grad
    for b in range(2):
        for g in range(3):
            assert kept[b, g].tolist() == reference_selection(k[b, g].detach(), v[b, g].detach(), config)


@pytest.mark.parametrize("num_tokens,num_partitions", [(2, 0), (22, 0), (23, 1), (33, 2)])
def test_number_of_partitions(num_tokens, num_partitions):
    _, k, v = random_qkv(num_tokens)
    assert select_kept(k, v, LRSAConfig(sink_size=3, lag_size=10, retention=0.2)).shape[2] == num_partitions


def test_ties_go_to_the_lower_position():
    """All tokens of a partition alike: all scores are equal, and the first K are kept."""
    config = LRSAConfig(sink_size=0, lag_size=16, retention=0.25)
    k, v = torch.randn(2, 1, 2, 4, 1, 8).repeat_interleave(16, 4).flatten(3, 4).unbind()
    k[:, :, 48:], v[:, :, 48:] = torch.randn(2, 1, 2, 16, 8).unbind()
    # The lag references of the first two partitions are constant too, so that every channel is degenerate there.
    kept = select_kept(k, v, config)
    assert kept.tolist() == [[[[16 * p + i for i in range(4)] for p in range(3)]] * 2]


@pytest.mark.parametrize("value", [0.0, 1.0, -1e30, 3e-38])
def test_degenerate_channels_stay_finite(value):
    config = LRSAConfig(sink_size=2, lag_size=8, retention=0.5, backend="chunked")
    inputs = random_qkv(60)
    with torch.no_grad():
        inputs[1][..., 3] = value  # constant everywhere
        inputs[2][..., 20:30, 5] = value  # constant in a lag reference only
        inputs[1][..., 30:40, 0] = 0.0
        inputs[1][..., 33, 0] = 1e-38  # a spread so small that the division overflows
    _, k, v = inputs
    kept = select_kept(k, v, config)
    assert (kept.diff(dim=-1) > 0).all()
    if abs(value) <= 1:
        output = lrsa_attention(*inputs, config)
        assert output.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), inputs))


def test_a_constant_channel_does_not_change_what_the_others_say():
    """A channel constant in the reference counts as 0 for every token, whatever its value."""
    config = LRSAConfig(sink_size=0, lag_size=16, retention=0.25)
    _, k, v = random_qkv(64)
    with torch.no_grad():
        k[..., 0] = 5.0
        other = k.clone()
        other[..., 0] = -7.0
    assert torch.equal(select_kept(k, v, config), select_kept(other, v, config))


@pytest.mark.parametrize(
    "setting,said",
    [
        (dict(retention=-0.1), "attention.retention=-0.1"),
        (dict(retention=1.5), "attention.retention=1.5"),
        (dict(retention="half"), "attention.retention"),
        (dict(lag_size=0), "attention.lag_size=0"),
        (dict(sink_size=-1), "attention.sink_size=-1"),
        (dict(lag_size=8, retention=0.1), "keeps nothing"),
        (dict(backend="triton"), "auto, chunked, flex"),
    ],
)
def test_bad_settings(setting, said):
    with pytest.raises(LRSAError, match=said):
        LRSAConfig(**setting)


def test_bad_shapes():
    q, k, v = random_qkv(20, heads=3, kv_heads=2)
    with pytest.raises(LRSAError, match="query heads a multiple"):
        lrsa_attention(q, k, v, LRSAConfig())
    with pytest.raises(LRSAError, match="sum to 19"):
        lrsa_attention(*random_qkv(20), LRSAConfig(), document_lengths=[10, 9])
    with pytest.raises(LRSAError, match="needs a CUDA device"):
        lrsa_attention(*random_qkv(20), LRSAConfig(backend="flex"))
    q, k, v = random_qkv(20)
    with pytest.raises(LRSAError, match="dtypes float32, float32, bfloat16: give them in one"):
        lrsa_attention(q, k, v.bfloat16(), LRSAConfig())


def test_the_release_of_flash_attn_4_is_the_one_that_is_installed():
    """Functions below its public ones are called, and may change from one release to the next."""
    assert f'"flash-attn-4=={RELEASE}"' in (ROOT / "pyproject.toml").read_text()
