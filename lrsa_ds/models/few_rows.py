"""Linear layers of one input as one product, for few rows.

A step of decoding multiplies few rows with every weight of the model, and its time is that of reading them. Kernels for
many rows read at two thirds of the speed of the memory, and each has a start and an end in which nothing is read. So
the products of queries, keys and values become one, as do gate and up of an MLP with the activation between them, and
what stands in front of a product and behind it joins it. No weight is copied.

A compiler sees one operator, `torch.ops.lrsa_ds.few_rows`.

Shapes: M rows, K channels of the input, N of a product.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear, silu

from lrsa_ds.attention.fused_decoding import HAS_TRITON
from lrsa_ds.models.fused_few_rows import MOST_ROWS, NARROWEST, fused_few_rows


@torch.library.custom_op("lrsa_ds::few_rows", mutates_args=())
def few_rows(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    gated: bool,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    behind: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layers of one input x [..., K], with weights [N, K] each: their outputs one after the other, [..., N].

    Args:
        biases: [N] of each product, or none.
        gated: two products give silu(first) * second.
        norm: weight [K] of the normalisation in front, x / sqrt(mean(x ** 2) + eps) * norm.
        residual: [..., N], added to the result.
        behind: the weight that is read next, of which a first part is fetched. It does not change the result.
    """
    if x.is_cuda and HAS_TRITON:
        rows, added = (None if y is None else y.reshape(-1, y.shape[-1]) for y in (x, residual))
        assert rows is not None
        return fused_few_rows(rows, weights, biases, gated, norm, eps, added, behind).view(*x.shape[:-1], -1)
    if norm is not None:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
        x = norm * (x.float() * scale).to(x.dtype)
    with_bias = [(weight, bias) for weight, bias in zip(weights, biases, strict=True)] if biases else zip(weights)
    parts = [linear(x, *parameters) for parameters in with_bias]
    output = silu(parts[0]) * parts[1] if gated else torch.cat(parts, dim=-1)
    return output if residual is None else residual + output


@few_rows.register_fake
def _(x, weights, biases, gated, norm=None, eps=0.0, residual=None, behind=None):
    return x.new_empty(*x.shape[:-1], len(weights[0]) if gated else sum(len(weight) for weight in weights))


def can_join(x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel can multiply x [..., K] with a weight, and add a bias if there is one."""
    weight, num_rows = parameters[0], x.numel() // x.shape[-1]
    return (
        HAS_TRITON
        and all(given.device.type == "cuda" and given.dtype == x.dtype for given in (x, *parameters))
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and isinstance(num_rows, int)
        and num_rows <= MOST_ROWS
        and weight.is_contiguous()
        and len(weight) % NARROWEST == 0
    )
