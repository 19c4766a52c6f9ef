"""Loading of Hugging Face causal language models: from the hub, a directory, a GGUF file, adapters, or random."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils.logging import disable_progress_bar

from lrsa_ds.dtypes import dtype_of
from lrsa_ds.errors import require
from lrsa_ds.hub import hub_error, resolve_name
from lrsa_ds.models.adapters import find_adapters, merge_saved
from lrsa_ds.models.quantized import (
    as_quantized,
    device_of_weights,
    quantization_config,
    quantize_matrices,
    random_quantized,
    round_matrices,
)
from lrsa_ds.models.rope import check_taken, restore_rope, saved_rope, set_rope
from lrsa_ds.models.wrappers import auto_class
from lrsa_ds.settings.model import ModelConfig

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """The configuration of `model`, with the positions of `model.rope`; no weights are loaded.

    Raises:
        LRSAError: the hub cannot be reached, the directory does not exist or has no weights, or the file is missing.
    """
    config = _own_config(model)
    set_rope(config, model.rope)
    return config


def _own_config(model: ModelConfig) -> PreTrainedConfig:
    if model.random is not None:
        settings = dict(model.random)
        return _named("model.random", AutoConfig.for_model, settings.pop("model_type"), **settings)
    if (adapters := find_adapters(model)) is not None:
        config = _own_config(adapters.base)
        restore_rope(config, adapters.rope)
        config.lrsa = adapters.lrsa or getattr(config, "lrsa", None)
        return config
    assert model.name is not None
    directory = Path(resolve_name("model.name", model.name))
    if directory.is_dir():
        _check_weights(directory, model.gguf_file)
    return _pretrained(AutoConfig, model)


def _pretrained(kind: type, model: ModelConfig, **options: Any) -> Any:
    """Calls `from_pretrained` of a class of transformers for `model.name`."""
    assert model.name is not None
    origin = {"revision": model.revision, "gguf_file": model.gguf_file, "trust_remote_code": model.trust_remote_code}
    options |= {key: value for key, value in origin.items() if value is not None}
    return _named("model.name", kind.from_pretrained, model.name, **options)


def _check_weights(directory: Path, gguf_file: str | None) -> None:
    if gguf_file is not None:
        files = ", ".join(sorted(p.name for p in directory.glob("*.gguf"))) or "none"
        require(
            (directory / gguf_file).is_file(),
            f"model.gguf_file={gguf_file} is not in model.name={directory}; GGUF files there: {files}.",
        )
        return
    require(
        any(path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern)),
        f"model.name={directory} holds no weights ({' or '.join(WEIGHT_PATTERNS)}): give the directory of a saved "
        "model, or model.gguf_file for a GGUF file.",
    )


def _named(key: str, function, name: str, **kwargs):
    """Calls a loader of transformers, and converts its error for a bad name to one sentence that names the key."""
    try:
        return function(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise hub_error(key, name, error) from error


def empty_model(model: ModelConfig) -> PreTrainedModel:
    """The model on the meta device: its structure and sizes without memory, to check them before weights are loaded."""
    config = model_config(model)
    with torch.device("meta"):
        structure = auto_class(config).from_config(config, trust_remote_code=model.trust_remote_code)
    check_taken(structure, model.rope)
    return structure


def load_model(model: ModelConfig, dtype: torch.dtype | str, deepspeed_config: dict | None = None) -> PreTrainedModel:
    """The model with its weights in `dtype`.

    Under ZeRO-3 (from `deepspeed_config`) each layer is sharded as soon as it is created, so no rank ever holds all
    parameters. Exceptions are GGUF files and adapters, which are merged: every rank reads these models completely.

    With `model.quantize` the matrices are on the device in 4 bits: quantized as they are read or drawn, so that `dtype`
    never holds all of them, but those of a GGUF file or of merged adapters after they were in host memory.
    """
    config = model_config(model)
    is_whole = model.gguf_file is None and find_adapters(model) is None and model.quantize is None
    # transformers looks for this object as long as it exists, and then uses DeepSpeed's sharded initialization.
    sharding = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config and is_whole else None
    try:
        return _load(model, config, dtype)
    finally:
        del sharding


def _load(model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    disable_progress_bar()  # one bar per rank would break the run's own bar
    if model.quantize is not None:
        assert isinstance(dtype, torch.dtype)
        return _load_in_4_bits(model, config, dtype)
    if model.random is not None:
        return auto_class(config).from_config(config, dtype=dtype)
    if model.gguf_file is not None:
        return _load_gguf(model, config, dtype)
    if (adapters := find_adapters(model)) is not None:
        merged = merge_saved(_load_base(adapters.base, config, dtype), adapters)
        merged.config.lrsa = config.lrsa
        return merged
    return _pretrained(auto_class(config), model, config=config, dtype=dtype)


def _load_base(base: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """The base of saved adapters as it was in their training: if it was in 4 bits, a plain model with their values."""
    if base.quantize is None:
        return _load(base, config, dtype)
    plain = _load(_unquantized(base), config, dtype_of(base.dtype))
    rounded: Any = round_matrices(plain, base)
    return rounded if isinstance(dtype, str) else rounded.to(dtype)


def _unquantized(model: ModelConfig) -> ModelConfig:
    return replace(model, quantize=None, double_quant=False)


def _load_in_4_bits(model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the matrices of its text model in 4 bits, on the device of this rank."""
    if model.gguf_file is not None or find_adapters(model) is not None:
        return quantize_matrices(_load(_unquantized(model), config, dtype), model)
    with torch.device("meta"):
        structure = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
    if model.random is not None:
        return random_quantized(structure, model)
    options = {"quantization_config": quantization_config(model, structure, dtype), "device_map": device_of_weights()}
    return as_quantized(_pretrained(auto_class(config), model, config=config, dtype=dtype, **options))


def _load_gguf(model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """Loads a GGUF file and dequantizes it. The result is an ordinary model that can be trained and saved."""
    loaded = _pretrained(AutoModelForCausalLM, model, dtype=dtype)
    # transformers marks the model as quantized, and refuses to save or train it, although the weights are plain now.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(loaded)(type(loaded.config)(**settings | saved_rope(config))).to(dtype)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    return plain
