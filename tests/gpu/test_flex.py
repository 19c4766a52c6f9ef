"""The compiled flex backend against the chunked one: forward and every gradient, by relative error."""

import random

import pytest
import torch

from lrsa_ds import LRSAConfig, lrsa_attention
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.partition import partition_table
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu


def compare(lengths, config, heads=4, kv_heads=2, dim=64, dtype=torch.float32):
    """Relative errors of output and gradients of q, k, v; both backends select from the same tensors."""
    shapes = [(1, heads, sum(lengths), dim)] + 2 * [(1, kv_heads, sum(lengths), dim)]
    inputs = [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]
    upstream = torch.randn(shapes[0], device="cuda", dtype=dtype)
    flex = lrsa_attention(*inputs, config, document_lengths=lengths)
    chunked = chunked_attention(*inputs, partition_table(tuple(lengths), config))
    gradients = [torch.autograd.grad(output, inputs, upstream) for output in (flex, chunked)]
    return [relative_error(a, b) for a, b in [(flex, chunked), *zip(*gradients, strict=True)]]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 2, 64), (3, 1, 64), (8, 8, 128)])
def test_flex_equals_chunked(dtype, tolerance, heads, kv_heads, dim, poison_empty):
    # TF32 in FlexAttention's fp32 dot products is why fp32 is not compared more closely.
    config = LRSAConfig(sink_size=16, lag_size=128, retention=0.25, backend="flex")
    errors = compare((1000, 333, 2001), config, heads, kv_heads, dim, dtype)
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(seed):
    """Odd lengths, sinks, lags and retentions, several documents."""
    draw = random.Random(seed)
    lag_size = draw.randrange(32, 300)
    config = LRSAConfig(
        sink_size=draw.randrange(0, 40), lag_size=lag_size, retention=draw.uniform(0.1, 0.9), backend="flex"
    )
    lengths = [draw.randrange(2, 8 * lag_size) for _ in range(draw.randrange(1, 5))]
    errors = compare(lengths, config, dtype=torch.bfloat16)
    assert max(errors) < 2e-2, errors


def test_another_layout_of_the_same_shape_compiles_nothing():
    config = LRSAConfig(sink_size=16, lag_size=128, retention=0.25, backend="flex")
    torch._dynamo.reset()
    compare((4096,), config, dtype=torch.bfloat16)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for lengths in [(2048, 2048), (1000, 3096), (4000, 96), (1500, 1500, 1096)]:
        compare(lengths, config, dtype=torch.bfloat16)
    sizes = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    assert sizes <= 2, "a kept buffer takes one of few sizes; nothing else may compile"
