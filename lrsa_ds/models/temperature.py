"""Queries that are scaled by their position (Llama 4, in layers without RoPE; https://arxiv.org/abs/2501.19399).

transformers counts the tokens of a pass there, which is wrong for packed documents and for the shard of a rank. Under
LRSA the positions of the pass count, and the attention function scales the queries.
"""

from typing import Any

import torch
from torch import nn

from lrsa_ds.models.passes import is_under_lrsa

SWITCH = "attn_temperature_tuning"  # of an attention module of transformers


def scales_queries(module: nn.Module) -> bool:
    return bool(getattr(module, SWITCH, False)) and not getattr(module, "use_rope", True)


def scale_by_position(module: nn.Module) -> None:
    """From now on `module` leaves the scaling to the attention function of LRSA, which gets it as `query_scale`."""
    if _give_scale not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_give_scale, with_kwargs=True)
        module.register_forward_hook(_switch_on, always_call=True)


def _give_scale(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before the forward: `query_scale` [B, 1, N, 1] of `position_ids` [B, N] in a pass under LRSA."""
    if not is_under_lrsa(kwargs):
        return args, kwargs
    setattr(module, SWITCH, False)
    steps = torch.floor((kwargs["position_ids"].float() + 1.0) / module.floor_scale)
    scale = torch.log1p(steps) * module.attn_scale + 1.0
    return args, kwargs | {"query_scale": scale[:, None, :, None]}


def _switch_on(module: nn.Module, args: tuple, output: Any) -> None:
    """Hook after the forward, even one that failed."""
    setattr(module, SWITCH, True)
