"""Layers with a sliding window on the kernels of a GPU, against the readable form in fp32."""

import pytest
import torch

from lrsa_ds.attention.kinds.local import cached_local_attention, local_attention
from lrsa_ds.attention.kinds.sliding_window import SlidingWindow
from lrsa_ds.models.cache_layers import LagKVLayer
from lrsa_ds.registry import KERNELS
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu
LENGTHS = (1000, 333, 2001, 66)


def inputs_for(backend, dtype, dim):
    if reason := KERNELS[backend].why_not(torch.device("cuda"), dtype, dim):
        pytest.skip(reason)
    shapes = [(1, sum(LENGTHS), heads, dim) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("backend,dim", [("flex", 64), ("flex", 256), ("fa4", 64), ("fa4", 128), ("fa4", 256)])
@pytest.mark.parametrize("window", [1, 77, 128, 1024])
def test_packed_documents(backend, dim, window, poison_empty):
    *inputs, upstream = inputs_for(backend, torch.bfloat16, dim)
    exact = [x.float().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    actual = local_attention(*inputs, SlidingWindow(window=window, backend=backend), LENGTHS)
    expected = local_attention(*exact, SlidingWindow(window=window, backend="chunked"), LENGTHS)
    gradients = torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, exact, upstream.float())
    errors = [relative_error(a, b) for a, b in [(actual, expected), *zip(*gradients, strict=True)]]
    # With a window of one token the scores have no gradient.
    assert max(errors[:1] + errors[3:] if window == 1 else errors) < 2e-2, errors


@pytest.mark.parametrize("backend,dim", [("flex", 256), ("fa4", 128), ("fa4", 256)])
def test_prefill_in_passes(backend, dim):
    q, k, v, _ = inputs_for(backend, torch.bfloat16, dim)
    config, found = SlidingWindow(window=300, backend=backend), []
    layer = LagKVLayer(config)
    for start in range(0, q.shape[2], 700):
        part = slice(start, start + 700)
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        found.append(cached_local_attention(q[:, :, part], keys, values, start, config))
    expected = local_attention(q.float(), k.float(), v.float(), SlidingWindow(window=300, backend="chunked"))
    assert relative_error(torch.cat(found, dim=2), expected) < 2e-2
