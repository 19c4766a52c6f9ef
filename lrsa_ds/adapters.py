"""Training a part of a model: frozen parameters, and low-rank adapters (LoRA) through PEFT."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrsa_ds.config import LoraConfig, require
from lrsa_ds.errors import LRSAError

ADAPTER = "default"


def check_peft(lora: LoraConfig) -> None:
    """Raises LRSAError if adapters are asked for and PEFT is not installed."""
    if lora.rank == 0:
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise LRSAError("model.lora.rank needs PEFT: pip install 'lrsa-ds[lora]', or set model.lora.rank=0.") from error


def freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Excludes parameters from training: those in whose name one of the regular expressions is found.

    Raises:
        LRSAError: a pattern is found in no name, or nothing is left to train.
    """
    for pattern in patterns:
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        example = next(name for name, _ in model.named_parameters())
        require(bool(found), f"model.freeze={pattern!r} is found in no parameter's name, such as {example}.")
        for parameter in found:
            parameter.requires_grad = False
    require(any(p.requires_grad for p in model.parameters()), f"model.freeze={patterns} leaves nothing to train.")


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Puts LoRA adapters into the model, in place; they alone are trained.

    Raises:
        LRSAError: no layer fits `model.lora.targets`.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(_peft_config(lora), model, ADAPTER)
    except ValueError as error:
        raise LRSAError(f"model.lora.targets={lora.targets!r}: {str(error).splitlines()[0]}") from error


def _peft_config(lora: LoraConfig):
    from peft import LoraConfig as PeftConfig

    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets.split(","))
    return PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")


def merge_adapters(model: PreTrainedModel, weights: dict[str, torch.Tensor], lora: LoraConfig) -> dict:
    """Weights of the plain model with the adapters added to them, from the weights of the model with adapters."""
    from peft import LoraModel

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
        tuned = LoraModel(plain, _peft_config(lora), ADAPTER)
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    return tuned.merge_and_unload().state_dict()


def save_adapters(model: PreTrainedModel, weights: dict[str, torch.Tensor], lora: LoraConfig, directory: Path) -> None:
    """The adapters alone, in PEFT's format: `PeftModel.from_pretrained(base, directory)` puts them back."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = _peft_config(lora)
    config.base_model_name_or_path = model.config.name_or_path
    config.inference_mode = True
    model.peft_config = {ADAPTER: config}
    adapters = get_peft_model_state_dict(model, state_dict=weights, adapter_name=ADAPTER)
    directory.mkdir(parents=True, exist_ok=True)
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
    save_file(prefixed, directory / "adapter_model.safetensors")
    config.save_pretrained(directory)
