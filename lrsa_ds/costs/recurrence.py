"""What the recurrent module of a layer costs beside its matrices: counted in a pass on the meta device.

Recurrences of a dozen kinds have no common formula, but each is linear in the tokens. So a module of the same sizes
runs forward and backward over few tokens and over twice as many, without data: the difference is what a token costs.
It runs the PyTorch code of transformers. Kernels of other packages compute the same, and save less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lrsa_ds.models.recurrent import CACHES, recurrent_modules

# Tokens at once in those that compute in blocks without saying how many: the gated delta rules of transformers.
BLOCK = 64
# Their windows of a few tokens cost little, and torch counts the backward pass as if all channels were connected.
UNCOUNTED = {op: lambda *_, **__: 0 for op in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)}


@dataclass(frozen=True)
class Recurrence:
    """Costs of a token in the recurrent module of a layer.

    Args:
        forward, backward: operations beside the products with its matrices.
        saved: bytes that its forward pass saves for the backward pass, by the bytes of a weight.
    """

    forward: float
    backward: float
    saved: Mapping[int, float]


def recurrences_of(layers: Sequence[nn.Module], config: Any) -> list[Recurrence | None] | None:
    """The costs of the recurrent module of each layer, None for layers without; None if a module does not run alone.

    Args:
        config: of the text model.
    """
    modules = [next(iter(recurrent_modules(layer)), None) for layer in layers]
    costs: dict[type | None, Recurrence | None] = {None: None}
    for module in modules:
        if module is not None and type(module) not in costs:
            try:
                costs[type(module)] = _costs(module, config)
            except (RuntimeError, TypeError, AttributeError):  # it needs a GPU, or what its layer sets in it
                return None
    return [costs[None if module is None else type(module)] for module in modules]


def _costs(module: Any, config: Any) -> Recurrence:
    count = getattr(module, "chunk_size", BLOCK)
    saved, forward, backward = {}, 0.0, 0.0
    for dtype in (torch.bfloat16, torch.float32):
        few, more = (_pass(module, config, dtype, tokens) for tokens in (count, 2 * count))
        forward, backward, saved[dtype.itemsize] = (max(0.0, b - a) / count for a, b in zip(few, more, strict=True))
    return Recurrence(forward, backward, saved)


def _pass(like: Any, config: Any, dtype: torch.dtype, num_tokens: int) -> tuple[float, float, float]:
    """Operations forward and backward beside the products with matrices, and bytes saved, over so many tokens."""
    with torch.device("meta"):
        module = type(like)(config, like.layer_idx).to(dtype)
        for name, buffer in like.named_buffers():  # those that a layer sets in it
            if not hasattr(module, name):
                module.register_buffer(name, torch.empty_like(buffer, dtype=dtype, device="meta"))
        hidden = torch.empty(1, num_tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        held.append(storage)  # so that no other gets its place
        return tensor

    held: list[torch.UntypedStorage] = []
    names = [name for name in CACHES if name in signature(module.forward).parameters]
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as forward, saved_tensors_hooks(note, lambda x: x):
        output = module.forward(hidden, **dict.fromkeys(names))
    output = output[0] if isinstance(output, tuple) else output
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as backward:
        output.backward(torch.empty_like(output))
    for tensor in (hidden, *module.parameters()):
        saved.pop(tensor.untyped_storage()._cdata, None)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    products = 2 * num_tokens * sum(m.in_features * m.out_features for m in linears)
    return forward.get_total_flops() - products, backward.get_total_flops() - 2 * products, sum(saved.values())
