"""Attention over one interval a query, its merge with another, and how a partition table is cut into shards."""

import pytest
import torch

from lrsa_ds import LRSAConfig
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels.blocks import BLOCK
from lrsa_ds.attention.kernels.flex import flex_interval_attention
from lrsa_ds.attention.kernels.interval import Intervals, interval_attention, merge
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.errors import LRSAError
from lrsa_ds.parallel.sequence.head_groups import check_heads
from lrsa_ds.parallel.sequence.shard import shard_layout
from lrsa_ds.parallel.sequence.strategy import Sharing
from lrsa_ds.parallel.sequence.ulysses import check_dense_heads
from lrsa_ds.registry import EXCHANGES
from tests.helpers import assert_close

SCALE = Extras(0.2)


def random_parts(num_queries, num_keys, heads=4, kv_heads=2, dim=16):
    shapes = [(1, heads, num_queries, dim)] + 2 * [(1, kv_heads, num_keys, dim)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def random_intervals(num_queries, num_keys):
    lo = torch.randint(0, num_keys, (num_queries,), dtype=torch.int32)
    hi = (lo + torch.randint(0, num_keys // 2, (num_queries,), dtype=torch.int32)).clamp(max=num_keys)
    hi[::7] = lo[::7]  # some see nothing
    return Intervals(lo, hi)


def masked_attention(q, k, v, visible, scale):
    """Output and log-sum-exp in fp64; `visible` is bool [queries, keys], and a query without a key gives 0 and -inf."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = ((q @ k.mT) * scale).exp() * visible
    empty = ~visible.any(-1)
    total = weights.sum(-1) + empty
    return weights @ v / total[..., None], total.log().masked_fill(empty, -torch.inf)


def visible_in(intervals, num_keys):
    keys = torch.arange(num_keys)
    return (keys >= intervals.lo[:, None]) & (keys < intervals.hi[:, None])


@pytest.mark.parametrize("num_queries,num_keys,heads,kv_heads", [(40, 77, 4, 2), (600, 300, 3, 1), (513, 64, 2, 2)])
def test_interval_attention_follows_the_definition(num_queries, num_keys, heads, kv_heads):
    inputs = random_parts(num_queries, num_keys, heads, kv_heads)
    intervals = random_intervals(num_queries, num_keys)
    out, lse = interval_attention(*inputs, intervals, SCALE)
    expected, expected_lse = masked_attention(*inputs, visible_in(intervals, num_keys), 0.2)
    assert_close(out, expected, 1e-6, "output")
    sees = intervals.hi > intervals.lo
    assert_close(lse[..., sees], expected_lse[..., sees], 1e-6, "log-sum-exp")
    assert (lse[..., ~sees] == -torch.inf).all() and (out[:, :, ~sees] == 0).all()
    upstream, upstream_lse = torch.randn_like(out), torch.randn_like(lse[..., sees])
    total = (out * upstream).sum() + (lse[..., sees] * upstream_lse).sum()
    expected_total = (expected * upstream).sum() + (expected_lse[..., sees] * upstream_lse).sum()
    gradients = zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected_total, inputs), strict=True)
    for name, (actual, wanted) in zip("qkv", gradients, strict=True):
        assert_close(actual, wanted, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("num_queries,num_keys", [(40, 200), (300, 270), (257, 129)])
def test_flex_interval_attention_is_the_same_function(num_queries, num_keys):
    """Forward only: FlexAttention has no backward on the CPU. Its gradients are compared in tests/gpu."""
    inputs = [x.detach() for x in random_parts(num_queries, num_keys)]
    intervals = random_intervals(num_queries, num_keys)
    sees = intervals.hi > intervals.lo
    out, lse = flex_interval_attention(*inputs, intervals, SCALE)
    expected, expected_lse = interval_attention(*inputs, intervals, SCALE)
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    assert_close(out[:, :, sees], expected[:, :, sees], 1e-5, "output")
    assert_close(lse[..., sees], expected_lse[..., sees], 1e-5, "log-sum-exp")


def test_merged_parts_are_attention_over_both():
    num_queries, num_keys, split = 50, 80, 33
    inputs = random_parts(num_queries, num_keys)
    q, k, v = inputs
    some = random_intervals(num_queries, split)
    own = Intervals(torch.full((num_queries,), split), torch.arange(split + 1, split + 1 + num_queries).clamp(max=80))
    shifted = Intervals(own.lo - split, own.hi - split)
    history = interval_attention(q, k[:, :, :split], v[:, :, :split], some, SCALE)
    window = interval_attention(q, k[:, :, split:], v[:, :, split:], shifted, SCALE)
    merged = merge(window, history, torch.float32)
    visible = visible_in(some, num_keys) | visible_in(own, num_keys)
    expected, _ = masked_attention(*inputs, visible, 0.2)
    assert_close(merged, expected, 1e-6, "output")
    upstream = torch.randn_like(merged)
    gradients = zip(
        torch.autograd.grad(merged, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream.double()),
        strict=True,
    )
    for actual, wanted in gradients:
        assert_close(actual, wanted, 1e-5, "gradient")


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("lengths", [(192,), (50, 3, 100, 39), (10, 10, 10, 162)])
def test_every_slot_of_the_kept_buffer_comes_from_one_rank(lengths, by_blocks):
    config, size = LRSAConfig(sink_size=3, lag_size=8, retention=0.5), 4
    layouts = [shard_layout(lengths, config, size, rank, by_blocks, torch.device("cpu")) for rank in range(size)]
    shared = layouts[0].buffer
    for rank, layout in enumerate(layouts):
        own, buffer = layout.buffer.own, layout.buffer
        starts = own.partitions.starts
        assert torch.equal(buffer.slots, shared.slots) and buffer.num_sent == shared.num_sent
        assert len(own.order) == shared.num_sent[rank] == len(own.sink_positions) + 4 * len(starts)
        # All that a rank selects from, and all that its windows see, is in its halo and shard.
        assert (starts >= 0).all() and (starts + 16 <= layout.halo_size + layout.shard_size).all()
        assert (own.sink_positions >= 0).all() and (layout.window.lo >= 0).all()
    table = partition_table(lengths, config, align=BLOCK if by_blocks else 1)
    sizes = [(d.buffer_lo, d.buffer_lo + 3 + 4 * d.num_partitions) for d in table.kept_documents]
    used = torch.cat([shared.slots[lo:hi] for lo, hi in sizes])
    assert used.tolist() == list(range(sum(shared.num_sent)))


def test_another_layout_takes_one_of_few_buffer_sizes():
    config = LRSAConfig(sink_size=16, lag_size=64, retention=0.25)
    draw = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(60):
        cuts = torch.randint(1, 8192, (3,), generator=draw).unique().tolist()
        lengths = tuple(b - a for a, b in zip([0, *cuts], [*cuts, 8192], strict=True))
        sizes.add(shard_layout(lengths, config, 2, 0, True, torch.device("cpu")).buffer.copies.size)
    assert len(sizes) <= 4


def test_what_cannot_be_shared():
    config = LRSAConfig(sink_size=16, lag_size=64, retention=0.25)

    def check(size, exchange):
        EXCHANGES[exchange].check(Sharing(size, 1024, "seq_len", 4 * size, size, config))

    check(7, "head_groups")
    check(3, "gather_kept")
    with pytest.raises(LRSAError, match=r"sp_size=8 .*head_groups cuts seq_len = 1,024 .* = 144: give at most 7"):
        check(8, "heads")  # its name in earlier releases
    with pytest.raises(LRSAError, match=r"parallel.sp_size=4 .*kept cuts .* into stretches of 128, .* at most 3"):
        check(4, "kept")
    with pytest.raises(LRSAError, match=r"parallel.sp_size=4 does not divide the 6 query heads .* 1, 2, 3, 6"):
        check_heads(6, 4)
    check_dense_heads(2, 4)
    with pytest.raises(LRSAError, match=r"divides the 3 KV heads .*leave 1.0 out of"):
        check_dense_heads(3, 2)
