"""All settings of a run, typed, with limits that are checked where they are declared.

`TrainConfig` is a complete run. Hydra composes it from `conf/`, and `typed_config` converts the composed values. So a
typo or a wrong type stops the run with one sentence before any process group starts.
"""

import difflib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lrsa_ds.errors import LRSAError, all_of, noting, require, require_whole
from lrsa_ds.settings.attention import AttentionConfig, require_compression
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.memory import MemoryConfig
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.paths import expand_home
from lrsa_ds.settings.run import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    ZeroConfig,
)


@dataclass(kw_only=True)
class TrainConfig:
    """A complete run. The order of the fields is the order of `config.yaml`."""

    run_name: str = "train"
    procedure: str = "qa"
    plugins: list[str] = field(default_factory=list)
    seq_len: int = 8192
    seed: int = 0
    output_dir: str | None = None
    activation_checkpointing: bool = True
    loss_chunk_size: int = 2048
    model: ModelConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        expand_home(self, "output_dir", "procedure")
        require_whole("seq_len", self.seq_len, 64)
        require_whole("seed", self.seed, 0)
        require_whole("loss_chunk_size", self.loss_chunk_size, 1)
        for retention in self.eval.retentions:
            self.attention.with_retention(retention)
        require(
            not self.checkpoint.best or self.eval.every > 0,
            "checkpoint.best=true needs eval.every, the steps between two evaluations to choose among.",
        )
        context_length = self.data.context_length
        require(
            context_length is None or context_length <= self.seq_len,
            f"data.context_length={context_length} is longer than seq_len={self.seq_len}: give at most seq_len.",
        )
        self._check_that_lrsa_does_something()
        require(
            self.optim.name != "adamw_8bit" or self.zero.offload_optimizer == self.zero.offload_param == "none",
            "optim.name=adamw_8bit holds its states on the GPU, and DeepSpeed's offload computes AdamW on the host: "
            "set zero.offload_optimizer and zero.offload_param to none, or optim.name=adamw.",
        )
        require(
            self.model.quantize is None or self.model.lora.rank > 0,
            f"model.quantize={self.model.quantize} freezes the base in 4 bits, so only adapters can be trained: set "
            "model.lora.rank to 1 or more, or model.quantize=null.",
        )
        require(
            self.activation_checkpointing or not self.memory.offload_checkpoints,
            "memory.offload_checkpoints=true moves what activation checkpointing holds, and activation_checkpointing "
            "is false: set it to true, or the lever to false.",
        )
        require(
            self.activation_checkpointing or not self.memory.save_attention,
            "memory.save_attention=true saves what activation checkpointing recomputes, and activation_checkpointing "
            "is false: set it to true, or the lever to false.",
        )
        require(
            not self.eval.telemetry or self.parallel.sp_size == 1,
            f"eval.telemetry=true needs whole sequences on each rank, and parallel.sp_size is {self.parallel.sp_size}: "
            "leave it at 1, or measure the exported model with launch/evaluate.py telemetry=true.",
        )
        require(
            self.optim.num_epochs is None or not self.data.streaming,
            "optim.num_epochs needs the number of rows, which data.streaming=true does not know: set optim.num_steps.",
        )
        require(
            self.optim.num_epochs is not None or self.optim.warmup_steps <= self.optim.num_steps,
            f"optim.warmup_steps={self.optim.warmup_steps} is more than optim.num_steps={self.optim.num_steps}.",
        )

    def _check_that_lrsa_does_something(self) -> None:
        """Refuses LRSA if no document is long enough to be compressed: it would be dense attention."""
        compressed = [attention for attention in self.attention.turns if not attention.is_dense]
        if not compressed:
            return
        key, length = "seq_len", self.seq_len
        if self.data.makes_contexts and self.data.context_length is not None:
            key, length = "data.context_length", self.data.context_length
        require_compression(key, length, compressed[0], "attention", "attention=dense")


def typed_config(composed: DictConfig, schema: type = TrainConfig) -> Any:
    """Converts the configuration that Hydra composed to the dataclass `schema`.

    Raises:
        LRSAError: an unknown key, a wrong type, a missing value or an invalid combination, in one sentence.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
        # Merged as plain values: a DictConfig would bring its own, weaker flags, and drop unknown keys silently.
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(schema), values))
        try:
            return OmegaConf.to_object(merged)
        except LRSAError as error:
            raise all_of([str(error), *_all_mistakes(merged)]) from None
    except OmegaConfBaseException as error:
        raise LRSAError(config_sentence(error, schema)) from error


def _all_mistakes(merged: DictConfig) -> list[str]:
    """The errors of every group, and then of the complete configuration."""
    with noting() as noted:
        for node in [*(value for value in merged.values() if isinstance(value, DictConfig)), merged]:
            try:
                OmegaConf.to_object(node)
            except LRSAError as error:
                noted.append(str(error))
            # A check that continued with a wrong value, which is noted already.
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                pass
    return noted


def save_settings(settings: dict, path: Path) -> None:
    """Writes a resolved configuration as YAML, in the order of its keys."""
    OmegaConf.save(OmegaConf.create(settings), path)


def load_settings(path: Path) -> dict:
    """The settings that `save_settings` wrote."""
    return cast(dict, OmegaConf.to_container(OmegaConf.load(path)))


def config_sentence(error: OmegaConfBaseException, schema: type = TrainConfig) -> str:
    """One sentence for an error of OmegaConf or Hydra about a key."""
    key = error.full_key or ""
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key_sentence(key, schema)
    said = str(error.msg if key else error).splitlines()[0].rstrip(".")
    return f"{key}: {said}{_form_of(key, schema)}." if key else f"{said}."


def _form_of(key: str, schema: type) -> str:
    """How to write a dictionary or a list on the command line, for an error; empty for other fields."""
    node, path = schema, []
    for name in re.split(r"[.\[]", key):
        node = {f.name: f.type for f in fields(node)}.get(name) if is_dataclass(node) else None
        path.append(name)
        kinds = {get_origin(node), *map(get_origin, get_args(node))}
        form = "{key: value}" if dict in kinds else "[value,value]" if list in kinds else None
        if form is not None:
            return f"; write '{'.'.join(path)}={form}'"
    return ""


def unknown_key_sentence(key: str, schema: type = TrainConfig) -> str:
    """A sentence for an unknown `key`: the valid keys of its group, and the most similar one."""
    *groups, name = key.split(".")
    node = schema
    for group in groups:
        known = {f.name: f.type for f in fields(node)} if is_dataclass(node) else {}
        if group in known and not is_dataclass(known[group]):
            return f"{key} is not a key of the configuration: {group} is one setting, written {group}=VALUE."
        if not is_dataclass(known.get(group)):
            key = name = group
            break
        node = known[group]
    valid = [f.name for f in fields(node)]
    alike = difflib.get_close_matches(name, valid, n=1)
    hint = f" Did you mean {alike[0]}?" if alike else ""
    return f"{key} is not a key of the configuration; valid here: {', '.join(valid)}.{hint}"
