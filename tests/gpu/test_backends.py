"""The block-sparse backends against the chunked one in fp32: forward and every gradient, by relative error."""

import random

import pytest
import torch

from lrsa_ds import LRSAConfig, lrsa_attention
from lrsa_ds.attention.buffered import buffered_layout
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.fused_buffer import fused_buffers
from lrsa_ds.attention.kept_buffer import buffer_plan, gather_kept
from lrsa_ds.attention.kernels import blocks
from lrsa_ds.attention.kernels.blocks import padded_buffer_size
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.attention.selection.lagkv import lag_scores
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import fast_select_partitions, has_fused_path, select_partitions
from lrsa_ds.notices import say_once
from lrsa_ds.registry import KERNELS
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu
BACKENDS = ["flex", "fa4"]


@pytest.fixture(autouse=True)
def queries_ahead(monkeypatch):
    """As long sequences have them, on flash-attn-4; no layout of another setting is there before or after."""
    monkeypatch.setattr(blocks, "LEAST_TOKENS_AHEAD", 0)
    buffered_layout.cache_clear()
    yield
    buffered_layout.cache_clear()


def compare(backend, lengths, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, **settings):
    """Relative errors of output and gradients of q, k, v; the oracle selects from the same tensors, in fp32."""
    reason = KERNELS[backend].why_not(torch.device("cuda"), dtype, dim)
    if reason:
        pytest.skip(reason)
    config = LRSAConfig(**settings, backend=backend)
    # In the order of memory that models give: a token's heads beside each other.
    shapes = [(1, sum(lengths), count, dim) for count in (heads, kv_heads, kv_heads, heads)]
    *inputs, upstream = (torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2) for s in shapes)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    actual = lrsa_attention(*inputs, config, document_lengths=lengths)
    expected = chunked_attention(*exact, partition_table(tuple(lengths), config))
    gradients = torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, exact, upstream.float())
    return [relative_error(a, b) for a, b in [(actual, expected), *zip(*gradients, strict=True)]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 2, 64), (3, 1, 64), (8, 8, 128), (12, 2, 128), (8, 4, 256)])
def test_kernels_equal_chunked(backend, dtype, tolerance, heads, kv_heads, dim, poison_empty):
    # TF32 in FlexAttention's fp32 dot products is why fp32 is not compared more closely.
    errors = compare(
        backend, (1000, 333, 2001), heads, kv_heads, dim, dtype, sink_size=16, lag_size=128, retention=0.25
    )
    assert max(errors) < tolerance, errors


def random_case(seed):
    """Odd lengths, sinks, lags and retentions, several documents, grouped heads."""
    draw = random.Random(seed)
    lag_size, kv_heads = draw.randrange(32, 300), draw.choice([1, 2, 3])
    return dict(
        lengths=[draw.randrange(2, 8 * lag_size) for _ in range(draw.randrange(1, 5))],
        heads=kv_heads * draw.choice([1, 2, 3, 4]),
        kv_heads=kv_heads,
        dim=draw.choice([64, 128, 256]),
        sink_size=draw.randrange(0, 40),
        lag_size=lag_size,
        retention=draw.uniform(0.1, 0.9),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_layouts(backend, seed):
    errors = compare(backend, **random_case(seed))
    assert max(errors) < 2e-2, errors


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_two_hundred_random_layouts(first):
    for seed in range(1000 + first, 1050 + first):
        errors = compare("fa4", **random_case(seed))
        assert max(errors) < 2e-2, (seed, errors)


def test_another_layout_of_the_same_shape_compiles_nothing():
    settings = dict(sink_size=16, lag_size=128, retention=0.25)
    torch._dynamo.reset()
    compare("flex", (4096,), **settings)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for lengths in [(2048, 2048), (1000, 3096), (4000, 96), (1500, 1500, 1096)]:
        compare("flex", lengths, **settings)
    sizes = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    assert sizes <= 2, "a kept buffer takes one of few sizes; nothing else may compile"


def partitions_at(starts, lag, num_kept, **settings):
    """The partitions that begin there, and settings that keep so many of each."""
    starts = torch.tensor(starts, device="cuda")
    config = LRSAConfig(sink_size=0, lag_size=lag, retention=(num_kept + 0.5) / lag, **settings)
    return Partitions(starts, torch.arange(len(starts), device="cuda"), None), config


@pytest.mark.parametrize("value_weight", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lag,num_kept,dim", [(128, 16, 64), (100, 33, 80), (1024, 128, 128), (37, 36, 64), (64, 1, 96)]
)
def test_fused_selection_is_the_same_function(dtype, lag, num_kept, dim, value_weight, poison_empty):
    k, v = (torch.randn(2, 7 * lag + 5, 3, dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    places = [3, lag, 4 * lag + 1, 5 * lag + 5]
    partitions, config = partitions_at(places, lag, num_kept, value_weight=value_weight)
    starts = partitions.starts
    fused = fast_select_partitions(k, v, partitions, config, 0)
    readable = select_partitions(k, v, partitions, config, 0)
    assert (fused.diff(dim=-1) > 0).all()
    # Where the sets differ, the scores on both sides of the cut are equal but for rounding.
    tokens = starts[:, None] + torch.arange(lag, device="cuda")
    of_keys, of_values = (lag_scores(x[:, :, tokens], x[:, :, tokens + lag]) for x in (k, v))
    scores = of_keys + value_weight * of_values
    chosen = [scores.gather(-1, kept - starts[:, None]).sort(dim=-1).values for kept in (fused, readable)]
    assert relative_error(*chosen) < 1e-5
    assert (fused == readable).float().mean() > 0.99


def test_fused_selection_breaks_ties_towards_the_lower_position():
    k = torch.randn(1, 2, 1, 64, device="cuda").expand(1, 2, 400, 64)  # every token is the same
    kept = fast_select_partitions(k, k, *partitions_at([10, 110], 100, 7), 0)
    assert kept[0, 0].tolist() == [list(range(10, 17)), list(range(110, 117))]


@pytest.fixture
def several_copies(monkeypatch, queries_ahead):
    """Histories are copied for every few queries, as they are for every 32,768 of a long sequence."""
    monkeypatch.setattr(blocks, "queries_a_copy", lambda table: 256)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(3000,), (777, 1500, 40, 1033)])
def test_several_copies_of_the_history(backend, lengths, several_copies, poison_empty):
    errors = compare(backend, lengths, sink_size=16, lag_size=128, retention=0.25)
    assert max(errors) < 2e-2, errors


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("lengths,dim", [((2000,), 64), ((700, 17, 1283), 80)])
def test_fused_buffers_are_the_same_function(dtype, tolerance, lengths, dim, several_copies, poison_empty):
    config = LRSAConfig(sink_size=5, lag_size=100, retention=0.33)
    layout = buffered_layout(lengths, config, torch.device("cuda"))
    assert len(layout.copies.parts) > 1
    k, v = (torch.randn(2, sum(lengths), 3, dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    buffers = fused_buffers(*(x.requires_grad_() for x in (k, v)), layout.table, layout.copies)
    # The readable form in fp64, with the tokens that the kernels selected.
    positions, seen = positions_of(k, v, layout), seen_slots(layout, sum(lengths))
    exact = [x.detach().double().requires_grad_() for x in (k, v)]
    for x, wide, buffer in zip((k, v), exact, buffers, strict=True):
        expected = torch.cat([layout.copies.of(gather_kept(wide, positions)), wide], dim=2)
        assert torch.equal(buffer[:, :, seen], expected[:, :, seen].to(dtype))
        assert buffer.isfinite().all()
        upstream = torch.randn_like(buffer) * seen[:, None]
        (gradient,) = torch.autograd.grad(buffer, x, upstream, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
        assert relative_error(gradient, wanted) < tolerance


def positions_of(k, v, layout):
    """Token behind each slot of the kept buffer, as the kernels select: int64 [B, G, R]."""
    plan = buffer_plan(layout.table, padded_buffer_size(layout.table), k.device)
    positions = plan.positions.repeat(*k.shape[:2], 1)
    kept = fast_select_partitions(k, v, plan.partitions, layout.table.config, 0)
    positions[:, :, plan.slots] = kept.flatten(2)
    return positions


def seen_slots(layout, num_tokens):
    """Which slots of [copies | tokens] any query sees."""
    seen = torch.zeros(layout.copies.size + num_tokens, dtype=torch.bool, device=layout.intervals.lo.device)
    for lo, hi in set(zip(layout.intervals.lo.tolist(), layout.intervals.hi.tolist(), strict=True)):
        seen[lo:hi] = True
    seen[layout.copies.size :] = True
    return seen


@pytest.mark.parametrize("value", [0.0, 1e30, -1e-30, float("inf")])
def test_fused_selection_with_degenerate_channels(value):
    k, v = (torch.randn(1, 2, 600, 64, device="cuda") for _ in range(2))
    k[..., :10] = value if value != float("inf") else 1e38
    k[:, :, 100:300, 0] = 1e38  # overflows where the reference is small
    partitions, config = partitions_at([0, 100, 300], 100, 20)
    fused = fast_select_partitions(k, v, partitions, config, 0)
    assert (fused == select_partitions(k, v, partitions, config, 0)).float().mean() > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["key_norm", "random", "window"])
def test_rules_without_kernels_of_their_own(rule, backend):
    """They run in PyTorch, and never in those of another rule; window has nothing to run, with and without a sink."""
    for sink_size in (0, 16):
        settings = dict(sink_size=sink_size, lag_size=128, retention=0.25, selection=rule)
        errors = compare(backend, (3000, 333, 2001), **settings)
        assert max(errors) < 2e-2, errors


def test_a_rule_without_kernels_says_so_once():
    k = torch.randn(1, 2, 600, 64, device="cuda")
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="attention.selection=key_norm has no fused GPU kernels") as said:
        answers = [has_fused_path(k, k, LRSAConfig(selection="key_norm")) for _ in range(2)]
    assert answers == [False, False] and len(said) == 1
    assert has_fused_path(k, k, LRSAConfig()) and not has_fused_path(k, k, LRSAConfig(selection="window"))
