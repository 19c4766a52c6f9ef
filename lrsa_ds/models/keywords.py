"""The keywords of a pass on their way to the attention: documents, caches and settings (see `apply_lrsa`).

transformers hands keywords on from the decoder to its layers and from them to the attention. Some layers take
keywords and keep them (Nemotron, StableLM; Llama 4 keeps the positions). There they are handed on from here.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lrsa_ds.models.parts import decoder_of, reads_encoder
from lrsa_ds.models.passes import is_under_lrsa
from lrsa_ds.models.temperature import scale_by_position, scales_queries

# What the attention function of LRSA reads.
OF_A_PASS = ("lrsa_config", "document_lengths", "attend", "num_seen", "pass_cache", "rows", "step", "position_ids")
INTERFACE = "attention_interface"  # how every model of transformers calls the attention function


def calls_interface(decoder: PreTrainedModel, layers: Iterable[int]) -> bool:
    """Whether the attention of each of these layers is a call of transformers' attention interface."""
    return set(layers) <= {getattr(module, "layer_idx", None) for module, _ in attention_modules(decoder)}


def lost_keywords(decoder: PreTrainedModel) -> str | None:
    """Where keywords are lost on their way, and cannot be handed on; None if they reach the attention."""
    for module, path in attention_modules(decoder):
        inside = next((i for i, part in enumerate(path) if isinstance(part, GradientCheckpointingLayer)), len(path))
        for place, part in enumerate([*path, module]):
            is_mended = inside <= place < len(path) and _takes_keywords(part)
            if not is_mended and not _hands_on_keywords(type(part), INTERFACE if part is module else None):
                return f"does not pass keywords to its attention (the forward of {type(part).__name__} drops **kwargs)"
    return None


def unfit_for_steps(model: PreTrainedModel) -> str | None:
    """Why a cache of fixed storage cannot serve single tokens (`lrsa_ds.generate`); None if it can."""
    modules: list[Any] = [module for module, _ in attention_modules(decoder_of(model))]
    if len({module.layer_idx for module in modules}) < len(modules):
        return "passes a token through its layers several times"
    for module in modules:
        names = ("num_heads", "num_key_value_groups", "num_key_value_heads")
        heads, *of_keys = (getattr(module, name, 0) for name in names)
        if heads and all(of_keys) and heads != prod(of_keys):
            return "repeats keys behind the cache"
    return None


def hand_on_keywords(decoder: PreTrainedModel) -> None:
    """Layers that keep keywords to themselves hand those of a pass on to their attention, from now on."""
    for module, path in attention_modules(decoder):
        for layer in path:
            is_needed = scales_queries(module) or not _hands_on_keywords(type(layer))
            if isinstance(layer, GradientCheckpointingLayer) and is_needed and not hasattr(layer, "keeper"):
                keeper = _Keeper()
                module.register_forward_pre_hook(keeper.add, with_kwargs=True)
                layer.__class__ = cast(Any, _keeping(type(layer)))
                object.__setattr__(layer, "keeper", keeper)
        if scales_queries(module):
            scale_by_position(module)


class _Keeper:
    """The keywords of the pass that a layer is in."""

    def __init__(self):
        self.keywords: dict[str, Any] = {}

    @contextmanager
    def of(self, keywords: dict[str, Any]) -> Iterator[None]:
        if is_under_lrsa(keywords):
            self.keywords = {name: keywords[name] for name in OF_A_PASS if name in keywords}
        try:
            yield
        finally:
            self.keywords = {}

    def add(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook before the forward of the attention in the layer."""
        return args, self.keywords | kwargs


@cache
def _keeping(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers whose forward remembers its keywords while it lasts.

    A hook would not do: recomputation in the backward pass calls the forward of the class, with the same keywords.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.keeper.of(kwargs):
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})  # of the same name, by which transformers knows layers


def attention_modules(decoder: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every layer's module that calls the attention function, and the modules around it, from the decoder on."""
    named = dict(decoder.named_modules())
    for path, module in named.items():
        calls = [_name(call.func) for call in _calls(type(module))]
        # Encoders of images inside the decoder have no layer_idx.
        if INTERFACE in calls and hasattr(module, "layer_idx") and not reads_encoder(path):
            parts = path.split(".")
            around = [named[".".join(parts[:count])] for count in range(len(parts))]
            yield module, [part for part in around if not isinstance(part, nn.ModuleList | nn.ModuleDict)]


def _takes_keywords(module: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def _hands_on_keywords(kind: type[nn.Module], name: str | None = None) -> bool:
    """Whether a call in the forward of a module, of the function `name` if given, passes `**kwargs` on."""
    calls = [call for call in _calls(kind) if name is None or _name(call.func) == name]
    return any(keyword.arg is None for call in calls for keyword in call.keywords)


def keywords_of(kind: type[nn.Module]) -> set[str | None]:
    """The keywords of all calls in the forward of a class; none if there is no source to read."""
    return {keyword.arg for call in _calls(kind) for keyword in call.keywords}


_CALLS: dict[type[nn.Module], list[ast.Call]] = {}


def _calls(kind: type[nn.Module]) -> list[ast.Call]:
    """The calls in the forward of a class; none if there is no source to read."""
    if kind not in _CALLS:
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
        except (OSError, TypeError):
            source = ""
        _CALLS[kind] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return _CALLS[kind]


def _name(function: ast.expr) -> str | None:
    return function.id if isinstance(function, ast.Name) else None
