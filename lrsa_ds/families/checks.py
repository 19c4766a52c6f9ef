"""What is measured of a family, on a tiny model in fp32: each check gives the largest relative error it found.

Sizes: 70 tokens under sinks of 2 tokens and partitions of 8, at retention 1/4: most tokens have a history.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.layers import AnyConfig
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.models.decoder import Decoder
from lrsa_ds.models.inference import prefill
from lrsa_ds.models.keywords import unfit_for_steps
from lrsa_ds.models.patch import PreTrainedModel, apply_lrsa, enable_checkpointing, new_cache
from lrsa_ds.models.recurrent import check_unshared
from lrsa_ds.objectives.objective import Batch
from lrsa_ds.objectives.target_loss import TargetLoss
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.parallel.sequence.attention import attention_function
from lrsa_ds.registry import EXCHANGES

LRSA = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
DENSE = replace(LRSA, retention=1.0)
NUM_TOKENS, NUM_PREFILLED = 70, 41
DOCUMENTS = (37, 60, 31)  # packed; two ranks share them, in stretches that end inside of documents
TOLERANCE = 1e-4
CHECKS = {
    "dense": "retention 1 = the stock model",
    "cache": "training = prefill = decoding",
    "packed": "packed = alone",
    "gather_kept": "gradients, SP 2, `gather_kept`",
    "head_groups": "gradients, SP 2, `head_groups`",
}


@dataclass(frozen=True)
class Row:
    """What is known of a family.

    Args:
        model: the class of its causal language model.
        unbuilt: why there is no tiny model of it.
        refused: the sentence of `apply_lrsa`.
        failed: the check that does not hold, and why.
        alone: why ranks cannot share its sequences; a family passes without these checks.
        errors: the relative error of each check that was made.
    """

    family: str
    model: str = ""
    unbuilt: str = ""
    refused: str = ""
    failed: str = ""
    alone: str = ""
    errors: dict[str, float] | None = None

    @property
    def verdict(self) -> str:
        return next((name for name in ("unbuilt", "refused", "failed") if getattr(self, name)), "passed")

    @property
    def why(self) -> str:
        """Why the verdict is not "passed"; empty if it is."""
        return self.unbuilt or self.refused or self.failed


def measure(family: str) -> Row:
    """A family on one rank: refused, or the checks against the stock model, of the cache, and of packed documents."""
    try:
        model = tiny_model(family)
        stock = _stock(model)
    except Exception as error:  # code of transformers, which may raise anything
        return Row(family, unbuilt=_said(error))
    name = type(model).__name__
    try:
        apply_lrsa(model, DENSE)
    except LRSAError as error:
        return Row(family, name, refused=str(error))
    checks = {
        "dense": lambda: _unlike(_log_likelihoods(model, DENSE), stock),
        "cache": lambda: _cache_error(model, stock),
        "packed": lambda: _packing_error(model),
    }
    return _checked(Row(family, name, errors={}), checks)


def measure_shared(row: Row, mesh: Mesh) -> Row:
    """A family that has passed, on two ranks that share the sequence: both exchanges. All ranks have to call it.

    A family that ranks cannot share, since it has recurrent layers, gets the sentence of the refusal instead, and the
    gradients of its packed documents are checked.
    """
    model = apply_lrsa(tiny_model(row.family), LRSA)
    try:
        check_unshared(model, mesh.sp_size)
    except LRSAError as error:
        packed = max((row.errors or {})["packed"], _packed_gradients_error(model))
        return _checked(replace(row, alone=str(error)), {"packed": lambda: packed})
    checks = {name: partial(_sharing_error, model, mesh, name) for name in ("gather_kept", "head_groups")}
    return _checked(row, checks)


def _checked(row: Row, checks: Mapping[str, Callable[[], float]]) -> Row:
    """The row after the checks, up to the first that does not hold."""
    errors = dict(row.errors or {})
    for name, check in checks.items():
        try:
            errors[name] = check()
        except Exception as error:
            return replace(row, errors=errors, failed=f"{name}: {_said(error)}")
        if not errors[name] <= TOLERANCE:
            return replace(row, errors=errors, failed=f"{name}: relative error {errors[name]:.0e}")
    return replace(row, errors=errors)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(4, 100, (1, num_tokens), generator=torch.Generator().manual_seed(1))


def _unlike(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def _stock(model: PreTrainedModel) -> torch.Tensor:
    """[N - 1]: the log-likelihood of each next token, as transformers has it."""
    ids = _ids(NUM_TOKENS)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def _batch(ids: torch.Tensor, lengths: tuple[int, ...], config: AnyConfig) -> Batch:
    """A row whose every token but the last of a document is a target's predecessor."""
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(ids, positions, labels, lengths, config, num_slots=ids.shape[1])


@torch.no_grad()
def _log_likelihoods(model: PreTrainedModel, config: AnyConfig, ids: torch.Tensor | None = None) -> torch.Tensor:
    """[N - 1]: the same in the training pass, with the logits that the objectives make."""
    ids = _ids(NUM_TOKENS) if ids is None else ids
    objective = TargetLoss(model, chunk_size=32).eval()
    return -objective.statistics(_batch(ids, (ids.shape[1],), config))[:, 0]


@torch.no_grad()
def _cache_error(model: PreTrainedModel, stock: torch.Tensor) -> float:
    """The training pass at retention 1/4 against chunk-by-chunk prefill, decoding, and steps of `lrsa_ds.generate`."""
    ids = _ids(NUM_TOKENS)
    apply_lrsa(model, LRSA)
    trained = _log_likelihoods(model, LRSA)
    if _unlike(trained, stock) < 1e-3:
        raise ValueError("retention changes nothing")
    cache, decoded = new_cache(model), []
    for token in ids[0, :-1]:
        decoded.append(model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1].float())
    after = {n: prefill(model, ids[:, :n], new_cache(model))[0].float() for n in (17, 33, 58, NUM_TOKENS - 1)}
    given = {n: logits.log_softmax(-1)[ids[0, n]] for n, logits in after.items()}
    of_decoding = torch.stack(decoded).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    of_prefill = torch.stack(list(given.values()))
    errors = [_unlike(of_decoding, trained), _unlike(of_prefill, trained[torch.tensor(list(given)) - 1])]
    if unfit_for_steps(model) is None:
        errors.append(_unlike(_of_steps(model, ids), trained[NUM_PREFILLED:]))
    return max(errors)


def _of_steps(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[N - 1 - NUM_PREFILLED]: the log-likelihood of each next token behind a cache of fixed storage."""
    cache, after = new_cache(model, max_tokens=NUM_TOKENS), []
    prefill(model, ids[:, :NUM_PREFILLED], cache)
    decoder = Decoder(model, captures=False)
    decoder.start(cache)
    for token in ids[0, NUM_PREFILLED:-1]:
        after.append(decoder(cache, token[None])[0].float().log_softmax(-1))
        decoder.end_step(cache)
    return torch.stack(after).gather(1, ids[0, NUM_PREFILLED + 1 :, None])[:, 0]


@torch.no_grad()
def _packing_error(model: PreTrainedModel) -> float:
    """Packed documents against each alone."""
    ids = _ids(sum(DOCUMENTS))
    packed = -TargetLoss(model, chunk_size=32).eval().statistics(_batch(ids, DOCUMENTS, LRSA))[:, 0]
    return _unlike(packed, torch.cat([_log_likelihoods(model, LRSA, part) for part in ids.split(DOCUMENTS, 1)]))


def _packed_gradients_error(model: PreTrainedModel) -> float:
    """Loss and every gradient of packed documents, under activation checkpointing, against the sums over each alone."""
    ids = _ids(sum(DOCUMENTS))
    alone = [_loss_and_gradients(model, _batch(part, (part.shape[1],), LRSA)) for part in ids.split(DOCUMENTS, 1)]
    summed = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    enable_checkpointing(model.train())
    return _largest_error(_loss_and_gradients(model, _batch(ids, DOCUMENTS, LRSA)), summed)


def _sharing_error(model: PreTrainedModel, mesh: Mesh, exchange: str) -> float:
    """Loss and every gradient of two ranks that share packed documents and recompute layers, against those of one."""
    assert mesh.sequence is not None
    mesh = replace(mesh, sequence=replace(mesh.sequence, strategy=EXCHANGES[exchange]))
    whole = _batch(_ids(sum(DOCUMENTS)), DOCUMENTS, LRSA)
    tokens = torch.cat([torch.arange(sum(DOCUMENTS))[part] for part in mesh.local_tokens(sum(DOCUMENTS))])
    parts = {name: getattr(whole, name)[:, tokens] for name in ("input_ids", "position_ids", "labels")}
    shared = replace(whole, **parts, num_slots=len(tokens), attend=attention_function(mesh.sequence))
    expected = _loss_and_gradients(model, whole)
    if model.supports_gradient_checkpointing:
        enable_checkpointing(model)
    for layer in model.modules():  # of the layers alone: in training mode some routers choose experts at random
        layer.training = isinstance(layer, GradientCheckpointingLayer)
    actual = _loss_and_gradients(model, shared)
    model.eval()
    for part in actual:
        dist.all_reduce(part)
    return _largest_error(actual, expected)


def _largest_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error of losses and gradients."""
    largest = max(e.norm().item() for e in expected)
    # A gradient that is zero but for rounding, as that of a bias of keys, is measured against the largest one.
    pairs = zip(actual, expected, strict=True)
    return max((a - e).norm().item() / max(e.norm().item(), 1e-3 * largest) for a, e in pairs)


def _loss_and_gradients(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss, _ = TargetLoss(model, chunk_size=32).losses(batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [loss.detach().view(1), *(gradient.contiguous() for gradient in found)]
