"""Training only a part of a model: frozen parameters, and low-rank adapters (LoRA) through PEFT; saving and loading."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.hub import looks_local
from lrsa_ds.models.parts import beside_decoder, decoder_of, holds_experts
from lrsa_ds.models.rope import saved_rope
from lrsa_ds.models.wrappers import auto_class
from lrsa_ds.notices import quiet_bitsandbytes, say_once
from lrsa_ds.settings.model import LoraConfig, ModelConfig

ADAPTER = "default"
# Files in a directory of adapters: PEFT's settings, LRSA's settings, positions, and how the base was quantized, if it
# was; and a base that has no name to load by.
PEFT_SETTINGS = "adapter_config.json"
SETTINGS = "lrsa.json"
ROPE = "rope.json"
QUANTIZATION = "quantization.json"
BASE = "base"


def check_peft(lora: LoraConfig) -> None:
    """Raises LRSAError if adapters are asked for and PEFT is not installed."""
    if lora.rank:
        _require_peft("model.lora.rank needs", ", or set model.lora.rank=0")


def _require_peft(what_needs: str, instead: str = "") -> None:
    quiet_bitsandbytes()
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise LRSAError(f"{what_needs} PEFT: pip install 'lrsa-ds[lora]'{instead}.") from error


def freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Excludes parameters from training: those whose name matches one of the regular expressions, anywhere.

    Raises:
        LRSAError: a pattern matches no name, or no parameter is left to train.
    """
    for pattern in patterns:
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        example = next(name for name, _ in model.named_parameters())
        require(bool(found), f"model.freeze={pattern!r} matches no parameter name, such as {example}.")
        for parameter in found:
            parameter.requires_grad = False
    require(any(p.requires_grad for p in model.parameters()), f"model.freeze={patterns} leaves nothing to train.")


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Adds LoRA adapters to the model, in place; only they are trained.

    Raises:
        LRSAError: no layer fits `model.lora.targets`, or no parameter a name of `model.lora.target_parameters`.
    """
    quiet_bitsandbytes()
    from peft import inject_adapter_in_model

    _check_target_parameters(model, lora)
    try:
        inject_adapter_in_model(_peft_config(lora, model), model, ADAPTER)
    except ValueError as error:
        raise LRSAError(f"model.lora.targets={lora.targets!r}: {str(error).splitlines()[0]}") from error
    # On packed weights PEFT leaves them in fp32.
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)


def _check_target_parameters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raises LRSAError for a name that no parameter ends with; says which experts get no adapters."""
    experts = [n for n, p in decoder_of(model).named_parameters() if holds_experts(p) and p.is_floating_point()]
    stacked = sorted({_of_layer(name) for name in experts})
    names = [name for name, _ in model.named_parameters()]
    for target in lora.target_names:
        require(
            any(_is_meant(name, [target]) for name in names),
            f"model.lora.target_parameters: no parameter's name ends with {target!r}; those that hold a matrix for "
            f"each expert are {', '.join(stacked) or 'none in this model'}.",
        )
    left_out = [name for name in stacked if not _is_meant(name, lora.target_names)]
    if left_out:
        say_once(
            f"{', '.join(left_out)} hold{'s' * (len(left_out) == 1)} all experts in one tensor, which gets no "
            f"adapters: set model.lora.target_parameters='{','.join(stacked)}' to train experts too."
        )


def _is_meant(name: str, targets: Sequence[str]) -> bool:
    """Whether the name of a parameter ends with one of these."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _of_layer(name: str) -> str:
    """The name of a parameter within its layer: what is behind the last number."""
    return re.split(r"\.\d+\.", name)[-1]


@contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model computes as if it had no adapters; for passes without gradients."""
    from peft.tuners.lora import LoraLayer

    # Adapters are scaled to 0 instead of disabled: ZeRO-3 relies on every module being called, in the same order.
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scale_layer(0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer()


def _peft_config(lora: LoraConfig, model: PreTrainedModel) -> Any:
    """PEFT's settings: what text never reaches, such as the encoder of images, gets no adapters."""
    from peft import LoraConfig as PeftConfig

    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets.split(","))
    alpha: Any = lora.alpha  # PEFT takes any number, and is annotated with int
    beside = "|".join(re.escape(path) for path in beside_decoder(model))
    excluded = rf"({beside})(\..*)?" if beside else None
    return PeftConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=targets,
        target_parameters=lora.target_names or None,
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )


def merge_adapters(model: PreTrainedModel, weights: dict[str, torch.Tensor], lora: LoraConfig) -> dict:
    """Weights of the plain model with the adapters merged, from the weights of the model with adapters."""
    from peft import LoraModel

    with torch.device("meta"):
        plain = auto_class(model.config).from_config(model.config)
        tuned = LoraModel(plain, _peft_config(lora, plain), ADAPTER)
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    return tuned.merge_and_unload().state_dict()


def base_name(model: ModelConfig) -> str | None:
    """The name under which PEFT finds the base from anywhere: a hub name, or an absolute path.

    None if PEFT cannot load it by a name: random weights, a GGUF file, or a base that has adapters itself.
    """
    if model.random is not None or model.gguf_file is not None or find_adapters(model) is not None:
        return None
    assert model.name is not None
    return str(Path(model.name).expanduser().resolve()) if looks_local(model.name) else model.name


def base_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the plain model, without the adapters, from the weights of the model with adapters."""
    return {name.replace(".base_layer.", "."): x for name, x in weights.items() if ".lora_" not in name}


def save_adapters(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    lora: LoraConfig,
    directory: Path,
    base: str,
    revision: str | None = None,
    quantized: dict[str, Any] | None = None,
) -> None:
    """Saves the adapters in PEFT's format, with the LRSA settings, the positions and the generation settings.

    Args:
        base: the name of the model that they belong to, see `base_name`.
        revision: of the base on the hub.
        quantized: the settings of `ModelConfig` by which the base of that name was quantized, if it was.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = _peft_config(lora, model)
    config.base_model_name_or_path, config.revision = base, revision
    config.inference_mode = True
    model.peft_config = {ADAPTER: config}
    # The embedding has not grown: without this, PEFT would look for its size in the base, perhaps on the hub.
    adapters = get_peft_model_state_dict(model, weights, adapter_name=ADAPTER, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
    save_file(prefixed, directory / "adapter_model.safetensors")
    config.save_pretrained(directory)
    # With a config.json transformers would take the directory for a complete model.
    for name, settings in ((SETTINGS, model.config.lrsa), (ROPE, saved_rope(model.config))):
        (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if quantized is not None:
        (directory / QUANTIZATION).write_text(json.dumps(quantized, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(directory)


@dataclass(frozen=True)
class SavedAdapters:
    """Adapters in a local directory, their base model, and the LRSA settings and positions of their training.

    The base may have been in 4 bits then: `base` says which, and in what dtype it was before.
    """

    directory: Path
    base: ModelConfig
    lrsa: dict | None
    rope: dict


def find_adapters(model: ModelConfig) -> SavedAdapters | None:
    """The adapters in the directory `model.name`; None if it is a hub name or another directory.

    Raises:
        LRSAError: their base is a path that does not exist, or PEFT is not installed.
    """
    if model.name is None or model.gguf_file is not None:
        return None
    directory = Path(model.name).expanduser()
    if not (directory / PEFT_SETTINGS).is_file() or (directory / "config.json").is_file():
        return None
    peft = json.loads((directory / PEFT_SETTINGS).read_text(encoding="utf-8"))
    # A base that was exported with the adapters is next to them.
    name = str(directory / BASE) if (directory / BASE).is_dir() else peft["base_model_name_or_path"]
    require(
        not looks_local(name) or Path(name).is_dir(),
        f"model.name={directory} holds adapters of {name}, which does not exist: restore the base, or name it in "
        f"base_model_name_or_path of {directory / PEFT_SETTINGS}.",
    )
    _require_peft(f"model.name={directory} holds adapters, which need")
    settings, positions = directory / SETTINGS, directory / ROPE
    lrsa = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    rope = json.loads(positions.read_text(encoding="utf-8")) if positions.is_file() else {}
    quantized: dict[str, Any] = {"quantize": None, "double_quant": False}
    if (directory / QUANTIZATION).is_file():
        quantized = json.loads((directory / QUANTIZATION).read_text(encoding="utf-8"))
    base = replace(model, name=name, revision=peft.get("revision"), **quantized)
    return SavedAdapters(directory, base, lrsa, rope)


def merge_saved(model: PreTrainedModel, saved: SavedAdapters) -> PreTrainedModel:
    """The base with the saved adapters merged into its weights: a plain model, to use or to train further."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, saved.directory).merge_and_unload()
    if (saved.directory / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(saved.directory)
    return merged
