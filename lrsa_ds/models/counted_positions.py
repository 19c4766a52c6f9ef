"""Embeddings of positions that count the tokens of a pass themselves: they get the positions of the pass instead.

Without that, the second of packed documents, and the shard of a rank, would go on where the first tokens end. There are
two sorts: RoBERTa's, which count from the padding token on, and those of BART's decoders, which take no positions.
"""

from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lrsa_ds.models.passes import is_under_lrsa


def place_tokens(decoder: PreTrainedModel) -> None:
    """From now on the embeddings of `decoder` that count tokens get the positions of each pass under LRSA."""
    if any(isinstance(getattr(hook, "__self__", None), _Positions) for hook in decoder._forward_pre_hooks.values()):
        return
    positions = _Positions()
    hooks = [(module, sort) for module in decoder.modules() if (sort := _sort(module)) is not None]
    if hooks:
        decoder.register_forward_pre_hook(positions.begin, with_kwargs=True)
        decoder.register_forward_hook(positions.end, always_call=True)
    for module, sort in hooks:
        module.register_forward_pre_hook(getattr(positions, sort), with_kwargs=True)
        if sort == "give_flat":
            module.register_forward_hook(positions.in_rows)


def _sort(module: nn.Module) -> str | None:
    """The hook that gives positions to a module, or None if it counts none."""
    if hasattr(module, "create_position_ids_from_input_ids"):
        return "give_behind_padding"
    is_learned = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
    names = signature(module.forward).parameters if is_learned else ()
    return "give_flat" if {"past_key_values_length", "position_ids"} <= set(names) else None


class _Positions:
    """The positions [B or 1, N] of the pass that a decoder is in; None outside of one under LRSA."""

    def __init__(self):
        self.of_pass: torch.Tensor | None = None

    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before the forward of the decoder, behind the one that reads the pass."""
        if not is_under_lrsa(kwargs):
            return
        self.of_pass = kwargs.get("position_ids")
        if self.of_pass is None:
            tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
            first = kwargs.get("num_seen") or 0
            self.of_pass = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]

    def end(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        """Hook after it, even if it failed."""
        self.of_pass = None

    def give_behind_padding(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook before RoBERTa's embeddings, in which the first position is that behind the padding token's."""
        if self.of_pass is None:
            return args, kwargs
        return args, kwargs | {"position_ids": self.of_pass + module.padding_idx + 1}

    def give_flat(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook before BART's, which take the positions of one row."""
        return args, kwargs if self.of_pass is None else kwargs | {"position_ids": self.of_pass.flatten()}

    def in_rows(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Hook after BART's: [B or 1, N, C] again."""
        return output if self.of_pass is None else output.view(*self.of_pass.shape, -1)
