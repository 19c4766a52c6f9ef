"""Capped scores, learned sinks and values of another head dim on the compiled kernels: output and every gradient."""

import pytest
import torch

from lrsa_ds import LRSAConfig, lrsa_attention
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.registry import KERNELS
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu
LENGTHS = (1000, 333, 2001)
CASES = {  # scale, cap, whether there are sinks, head dims of keys and values
    "gemma2": (0.1, 2.0, False, (256, 256)),
    "gpt_oss": (None, None, True, (64, 64)),
    "deepseek_v3": (None, None, False, (192, 128)),
    "all": (0.1, 2.0, True, (64, 128)),
}


@pytest.mark.parametrize("backend", ["flex", "fa4"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("retention", [0.25, 1.0])
def test_kernels_equal_chunked(backend, case, retention, poison_empty):
    scale, softcap, has_sinks, dims = CASES[case]
    reason = KERNELS[backend].why_not(torch.device("cuda"), torch.bfloat16, *dims, softcap is not None)
    if reason:
        pytest.skip(reason)
    shapes = [(1, sum(LENGTHS), heads, dim) for heads, dim in ((4, dims[0]), (2, dims[0]), (2, dims[1]), (4, dims[1]))]
    *inputs, upstream = (torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in shapes)
    sinks = torch.randn(4, device="cuda").requires_grad_() if has_sinks else None
    extras = Extras(scale, softcap, sinks)
    config = LRSAConfig(sink_size=16, lag_size=128, retention=retention, backend=backend)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    actual = lrsa_attention(*inputs, config, LENGTHS, extras=extras)
    expected = chunked_attention(*exact, partition_table(LENGTHS, config), extras)
    also = [sinks] if sinks is not None else []
    gradients = (
        torch.autograd.grad(actual, [*inputs, *also], upstream),
        torch.autograd.grad(expected, [*exact, *also], upstream.float()),
    )
    errors = [relative_error(a, b) for a, b in [(actual, expected), *zip(*gradients, strict=True)]]
    assert max(errors) < 2e-2, errors
