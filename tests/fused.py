"""A kernel of interval attention for the CPU that saves what those of GPUs save, and counts how often it runs."""

import torch

from lrsa_ds.attention.kernels.interval import interval_attention
from lrsa_ds.attention.kernels.kernel import Kernel
from lrsa_ds.registry import KERNELS

NAME = "counted"


class _Attention(torch.autograd.Function):
    num_forward = num_backward = 0

    @staticmethod
    def forward(ctx, q, k, v, intervals, extras):
        _Attention.num_forward += 1
        out, lse = interval_attention(q, k, v, intervals, extras)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # in memory as flash-attn-4 writes it
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = intervals, extras
        return out, lse

    @staticmethod
    def backward(ctx, *gradients):
        _Attention.num_backward += 1
        *inputs, out, lse = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in inputs]
            again = interval_attention(*inputs, *ctx.given)
        # A kernel believes that these belong to the inputs.
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
        return *torch.autograd.grad(again, inputs, gradients), None, None


def counts() -> tuple[int, int]:
    """How often it has run forward and backward."""
    return _Attention.num_forward, _Attention.num_backward


def register() -> str:
    """Puts the kernel into the table, in front of the others so that "auto" never chooses it, and returns its name."""
    if NAME not in KERNELS:
        kernel = Kernel(attend=_Attention.apply, wants_whole_blocks=False)
        KERNELS._entries = {NAME: kernel, **KERNELS._entries}
    return NAME
