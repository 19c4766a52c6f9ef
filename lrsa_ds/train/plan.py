"""Everything known about a run before a process group starts, and all checks that need none."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch

from lrsa_ds.attention.kernels.kernel import choose_kernel
from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.shape import ModelShape, model_shape
from lrsa_ds.data.procedure import Procedure, RunData, prepare_data
from lrsa_ds.data.survey import SAMPLED_TOKENS, DataReport, steps_of_epochs, survey
from lrsa_ds.data.tokenizer import Tokenizer, load_tokenizer
from lrsa_ds.dtypes import dtype_of
from lrsa_ds.errors import Problems, require
from lrsa_ds.inputs import check_inputs
from lrsa_ds.layer_settings import ModelLayers
from lrsa_ds.layers import AnyConfig, each_in_model
from lrsa_ds.logs.trackers import check_trackers
from lrsa_ds.models.adapters import check_peft
from lrsa_ds.models.heads import extras_of_model, head_dims
from lrsa_ds.models.liger import check_liger
from lrsa_ds.models.offload import check_host_memory
from lrsa_ds.models.patch import PreTrainedModel
from lrsa_ds.models.quantized import check_quantize
from lrsa_ds.models.structure import layers_of
from lrsa_ds.notices import say_once
from lrsa_ds.objectives import check_objective
from lrsa_ds.parallel.mesh import world_size
from lrsa_ds.parallel.optimizers import check_optimizer
from lrsa_ds.registry import EXCHANGES
from lrsa_ds.settings.caches import caches_of
from lrsa_ds.settings.run import shortened_warmup
from lrsa_ds.train.checkpoint import ResumePoint, check_resume, find_checkpoint
from lrsa_ds.train.checks import check_model
from lrsa_ds.train.forecast import choose_levers, machine_here
from lrsa_ds.train.output import check_begun, check_output


@dataclass(frozen=True)
class Plan:
    """The result of `prepare`; `config` is complete, with the values that depend on the data and the model."""

    config: TrainConfig
    dtype: torch.dtype
    num_parameters: int
    tokenizer: Tokenizer
    data: RunData
    report: DataReport
    resume: ResumePoint | None
    layers: ModelLayers
    num_frozen: int = 0
    shape: ModelShape | None = None  # None: its operations cannot be counted

    @property
    def turns(self) -> tuple[AnyConfig, ...]:
        """The attention that steps take in turn, in every layer of the model."""
        return each_in_model(self.config.attention.turns, self.layers)

    @property
    def checkpoint_bytes(self) -> int:
        """Upper bound for a checkpoint: the weights, an fp32 copy of them, two moments, and frozen weights."""
        return self.num_parameters * (self.dtype.itemsize + 12) + self.num_frozen * self.dtype.itemsize


def prepare(config: TrainConfig, procedure: Procedure) -> Plan:
    """Checks everything that one process can check, at the cost of reading the beginning of the data.

    Raises:
        LRSAError: one sentence for each failed check, among checks that do not depend on each other.
    """
    problems = Problems()
    for check in (
        partial(check_trackers, config.log),
        partial(check_peft, config.model.lora),
        partial(check_quantize, config.model),
        partial(check_optimizer, config),
    ):
        with problems.collect():
            check()
    if config.output_dir is not None:
        with problems.collect():  # before they are read: one error for one mistake
            check_inputs(Path(config.output_dir).expanduser(), config.model, config.data)
    architecture = data = None
    with problems.collect():
        architecture = _architecture(config)
    with problems.collect():
        tokenizer = load_tokenizer(config.model)
        data = prepare_data(procedure, config, tokenizer)
    if architecture is None or data is None:
        problems.raise_all()
    dtype, num_parameters, num_frozen, vocabulary, config, layers, shape = architecture
    with problems.collect():
        check_output(config, num_parameters, dtype.itemsize)
    with problems.collect():
        require(
            len(tokenizer) <= vocabulary,
            f"model.tokenizer has {len(tokenizer)} tokens, and the model has embeddings for {vocabulary}: they do not "
            "belong together.",
        )
    problems.raise_all()
    config = _with_steps(config, data)
    turns = each_in_model(config.attention.turns, layers)
    short = max(0 if settings.is_dense else settings.dense_prefix_size for settings in turns)
    report = survey(data, short, None if config.data.report == "all" else SAMPLED_TOKENS)
    plan = Plan(config, dtype, num_parameters, tokenizer, data, report, None, layers, num_frozen, shape)
    return replace(plan, resume=find_resume(config, plan))


class _Architecture(NamedTuple):
    """The properties of a model that a run needs; `num_frozen` counts the parameters of frozen copies."""

    dtype: torch.dtype
    num_parameters: int
    num_frozen: int
    vocabulary: int
    config: TrainConfig  # with the settings of every layer, and the levers that memory=auto has chosen
    layers: ModelLayers
    shape: ModelShape | None


def _architecture(config: TrainConfig) -> _Architecture:
    """The sizes of the model, once it is known that the run can train it here."""
    dtype = dtype_of(config.model.dtype)
    if config.memory.auto:
        config = choose_levers(config, machine_here(config), dtype.itemsize)
    config, structure = check_model(config)
    objective = check_objective(config)
    check_host_memory(config, structure, dtype)
    check_liger(config.model, structure.config.model_type)
    _check_backend(config, structure, dtype)
    num_parameters = sum(p.numel() for p in structure.parameters())
    num_frozen = num_parameters * objective.num_frozen_copies(config)
    vocabulary = cast(int, structure.get_input_embeddings().num_embeddings)
    layers, shape = layers_of(structure.config), model_shape(structure)
    return _Architecture(dtype, num_parameters, num_frozen, vocabulary, config, layers, shape)


def find_resume(config: TrainConfig, plan: Plan) -> ResumePoint | None:
    """The checkpoint from which the run resumes, if its directory holds one.

    Raises:
        LRSAError: this run may not use the directory, or the directory holds another run.
    """
    point = check_output(config, plan.num_parameters, plan.dtype.itemsize)
    if point is None:
        check_begun(config)
        return None
    return check_resume(point, config, plan.data.fingerprint())


def _with_steps(config: TrainConfig, data: RunData) -> TrainConfig:
    """The configuration with the steps for `optim.num_epochs`; a resumed run takes them from its checkpoint."""
    optim = config.optim
    if optim.num_epochs is None:
        return config
    point = None
    if config.output_dir is not None and not config.checkpoint.overwrite:
        point = find_checkpoint(Path(config.output_dir).expanduser())
    earlier = point.settings["optim"] if point else {}
    if earlier.get("num_epochs") == optim.num_epochs:
        num_steps = earlier["num_steps"]
    else:
        num_replicas = world_size() // config.parallel.sp_size
        num_steps = steps_of_epochs(data, optim.num_epochs, num_replicas * optim.micro_batch * optim.grad_accum)
    warmup_steps, makes = optim.warmup_steps, f"optim.num_epochs={optim.num_epochs} makes {num_steps} steps"
    if warmup_steps > num_steps and optim.shorten_warmup:
        warmup_steps = shortened_warmup(num_steps)
        say_once(f"optim.warmup_steps={warmup_steps} in place of {optim.warmup_steps}: {makes}.")
    require(warmup_steps <= num_steps, f"{makes}, fewer than optim.warmup_steps={warmup_steps}: lower it.")
    return replace(config, optim=replace(optim, num_steps=num_steps, warmup_steps=warmup_steps))


def _check_backend(config: TrainConfig, structure: PreTrainedModel, dtype: torch.dtype) -> None:
    """Checks that the attention backend in the settings can run here."""
    dims, extras = head_dims(structure.config.get_text_config()), extras_of_model(structure)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    merges_parts = config.parallel.sp_size > 1 and EXCHANGES[config.parallel.exchange].merges_parts
    caches = [cache.config for cache in caches_of(config.attention, config.eval, layers_of(structure.config))]
    for layer in {layer for settings in [*config.attention.turns, *caches] for layer in settings.layers}:
        needs = dict(needs_lse_gradient=merges_parts, value_dim=dims.values, extras=extras)
        choose_kernel(layer, device, dtype, dims.keys, **needs)
