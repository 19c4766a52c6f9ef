"""Mixtures of experts: what their routers choose, and the parts of the loss that spreads tokens over the experts.

transformers names the routers of every model whose router logits can be recorded, and which output of a router they
are. Hooks read them there, so that the models stay as they are, and only sums over tokens leave a layer.

Shapes: N tokens, E experts, K experts of a token, L routers.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lrsa_ds.errors import require
from lrsa_ds.models.parts import decoder_of
from lrsa_ds.settings.model import ModelConfig

KEY = "model.router_aux_loss_coef"
OWN_KEYS = ("router_aux_loss_coef", "aux_loss_coef")  # in the settings of transformers


class Routing(NamedTuple):
    """Sums over the tokens of a pass, without padding, in fp32.

    Args:
        probabilities: [E], of each expert over all routers, with gradients; empty where there is no loss.
        choices: [E], how often the loss counts an expert among the K likeliest, over all routers; empty likewise.
        load: [L, E], how often each router has sent a token to each expert.
    """

    probabilities: torch.Tensor
    choices: torch.Tensor
    load: torch.Tensor


def router_coefficient(settings: ModelConfig, model: PreTrainedModel) -> float | None:
    """What the balance loss is multiplied by; None where there is none.

    Raises:
        LRSAError: `model.router_aux_loss_coef` is a number above 0, and the model has no such loss.
    """
    given, own = settings.router_aux_loss_coef, _own_coefficient(model)
    if given == "auto":
        return own or None
    require(
        not given or own is not None,
        f"{KEY}={given} needs a mixture of experts with a load-balancing loss, and {type(model).__name__} has none: "
        "set it to auto or null.",
    )
    return float(given) if given else None


def _own_coefficient(model: PreTrainedModel) -> float | None:
    """That of the model's settings, or None if its class has no load-balancing loss."""
    has_loss = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    config = model.config.get_text_config()
    found = [getattr(config, key) for key in OWN_KEYS if hasattr(config, key)]
    return float(found[0] or 0.0) if has_loss and found and _routers(model) else None


def _routers(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """The routers in the order of the layers, each with the place of its logits [N, E] among what it returns."""
    decoder: Any = decoder_of(model)
    named = (decoder._can_record_outputs or {}).get("router_logits", ())
    recorders = named if isinstance(named, list | tuple) else [named]
    return [
        (module, recorder.index)
        for path, module in decoder.named_modules()
        for recorder in recorders
        if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in path
    ]


class Routers:
    """The routers of a model under watch.

    Args:
        model: its training passes are watched, those without gradients are not.
        coefficient: of the balance loss, or None: the load alone is counted.

    Attributes:
        num_routers: L.
    """

    def __init__(self, model: PreTrainedModel, coefficient: float | None):
        found = _routers(model)
        self.num_routers, self.coefficient = len(found), coefficient
        self._num_chosen: int | None = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        self._is_token: torch.Tensor | None = None
        self._seen: list[Routing] | None = None
        for router, index in found:
            router.register_forward_hook(partial(self._read, index))

    @classmethod
    def of(cls, model: PreTrainedModel, coefficient: float | None) -> "Routers | None":
        """Those of `model`, or None if it has no router that transformers records."""
        return cls(model, coefficient) if _routers(model) else None

    @contextmanager
    def watching(self, is_token: torch.Tensor | None) -> Iterator[list[Routing]]:
        """While it lasts, what each router does is added to the list.

        Args:
            is_token: bool [N], False for padding, or None: there is none.
        """
        self._is_token, self._seen = is_token, []
        try:
            yield self._seen
        finally:
            self._seen = None

    def _read(self, index: int, router: nn.Module, args: tuple, output: tuple) -> None:
        """Hook behind a router. A layer that is recomputed in the backward pass computes the same again, unseen."""
        if not torch.is_grad_enabled():
            return
        logits = output[index].flatten(0, -2)  # [N, E]
        shares = logits.new_ones(len(logits), dtype=torch.float32)
        if self._is_token is not None:
            shares = self._is_token.to(shares)
        chosen = _chosen(output, logits, self._num_chosen)
        probabilities = choices = shares.new_empty(0)
        if self.coefficient is not None:
            of_token = logits.softmax(-1, dtype=torch.float32)
            probabilities = shares @ of_token
            choices = _count(of_token.detach().topk(chosen.shape[1]).indices, shares, logits.shape[1])
        if self._seen is not None:
            self._seen.append(Routing(probabilities, choices, _count(chosen, shares, logits.shape[1])))


def total(seen: list[Routing]) -> Routing:
    """The sums of a pass, from those of its routers."""
    probabilities, choices, load = zip(*seen, strict=True)
    return Routing(torch.stack(probabilities).sum(0), torch.stack(choices).sum(0), torch.stack(load))


def _chosen(output: tuple, logits: torch.Tensor, num_chosen: int | None) -> torch.Tensor:
    """The experts of each token, [N, K]: as the router says, or else the likeliest."""
    for x in (x for x in output if isinstance(x, torch.Tensor)):
        if x.dim() > 1 and not x.is_floating_point() and x.shape[:-1].numel() == len(logits):
            return x.flatten(0, -2)
    assert num_chosen is not None  # a setting of every such model
    return logits.detach().topk(num_chosen).indices


def _count(chosen: torch.Tensor, shares: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens chose each expert, [E]; chosen [N, K], shares [N]: 1 for a token, 0 for padding."""
    counts = shares.new_zeros(num_experts)
    return counts.scatter_add_(0, chosen.flatten(), shares.repeat_interleave(chosen.shape[1]))
