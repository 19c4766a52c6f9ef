"""A frozen base in 4 bits, on which adapters are trained (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes stores the matrices of the text model in blocks of 64 numbers: 4 bits for each number, and a scale for each
block. Embeddings, norms, biases and the output layer keep their dtype. A pass dequantizes one matrix at a time.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lrsa_ds.dtypes import dtype_setting
from lrsa_ds.errors import require
from lrsa_ds.models.parts import decoder_of, holds_experts
from lrsa_ds.notices import quiet_bitsandbytes
from lrsa_ds.settings.model import ModelConfig


def check_quantize(model: ModelConfig) -> None:
    """Raises LRSAError if weights in 4 bits are asked for and bitsandbytes is not installed."""
    require(
        model.quantize is None or importlib.util.find_spec("bitsandbytes") is not None,
        f"model.quantize={model.quantize} needs bitsandbytes: pip install 'lrsa-ds[qlora]', or set it to null.",
    )


def check_quantizable(model: ModelConfig, structure: PreTrainedModel) -> None:
    """Raises LRSAError if most weights of the text model are of another kind than bitsandbytes quantizes.

    Args:
        structure: the model on the meta device.
    """
    if model.quantize is None:
        return
    has_experts = any(map(holds_experts, decoder_of(structure).parameters()))
    require(
        bool(quantized_matrices(structure)) and not has_experts,
        f"model.quantize={model.quantize} quantizes matrices that are torch.nn.Linear, and {type(structure).__name__} "
        f"has {'experts in one tensor' if has_experts else 'none'}: set model.quantize=null.",
    )


def quantized_matrices(model: PreTrainedModel) -> list[str]:
    """The names of the modules whose matrices are stored in 4 bits: all of the text model but the output layer."""
    inside = {id(module) for module in decoder_of(model).modules()}
    return [name for name, m in model.named_modules() if type(m) is nn.Linear and id(m) in inside]


def quantization_config(model: ModelConfig, structure: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings with which transformers quantizes each weight as it is read from its file."""
    quiet_bitsandbytes()
    chosen = set(quantized_matrices(structure))
    others = [name for name, m in structure.named_modules() if isinstance(m, nn.Linear) and name not in chosen]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantize,
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )


def device_of_weights() -> torch.device:
    """Where weights are quantized: the GPU of this rank, if it has one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quantize_matrices(model: PreTrainedModel, settings: ModelConfig) -> PreTrainedModel:
    """Quantizes the matrices of a loaded model one after the other, in place, and returns the model."""
    for name in quantized_matrices(model):
        model.set_submodule(name, _in_4_bits(model.get_submodule(name), settings))
    return as_quantized(model)


def random_quantized(structure: PreTrainedModel, settings: ModelConfig) -> PreTrainedModel:
    """Gives a model on the meta device random weights, in place, and returns it.

    They are made on the device and quantized module by module, so neither the host nor the device ever holds all of
    them in their dtype.
    """
    names = set(quantized_matrices(structure))
    with torch.no_grad():
        _fill(structure, "", structure, names, settings)
    structure.tie_weights()
    return as_quantized(structure)


def _fill(module: nn.Module, path: str, owner: PreTrainedModel, names: set[str], settings: ModelConfig) -> None:
    """Initializes a module and all below it as the model that they belong to, `owner`, would; then packs its matrices.

    In this order, since some models initialize a matrix once more with the module that it is in.
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    for name, child in module.named_children():
        _fill(child, f"{path}{name}.", owner, names, settings)
    module.to_empty(device=device_of_weights(), recurse=False)
    owner._init_weights(module)
    for name, child in list(module.named_children()):
        if f"{path}{name}" in names:
            setattr(module, name, _in_4_bits(child, settings))


def _in_4_bits(matrix: Any, settings: ModelConfig) -> nn.Module:
    """A matrix, `torch.nn.Linear`, as bitsandbytes stores it, on the device."""
    quiet_bitsandbytes()
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed: Any = Params4bit
    form: dict[str, Any] = {"quant_type": settings.quantize, "compress_statistics": settings.double_quant}
    with torch.device("meta"):
        layer = Linear4bit(
            matrix.in_features, matrix.out_features, matrix.bias is not None, matrix.weight.dtype, **form
        )
    layer.weight = packed(matrix.weight.data, module=layer, **form).to(device_of_weights())
    layer.bias = matrix.bias
    return layer.requires_grad_(False)


def as_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Marks a model for PEFT, and makes its layers keep their weights as they are; in place."""
    for layer in quantized_layers(model).values():
        # Without gradients, bitsandbytes would pack the weights anew for a kernel in bf16, which has no backward pass.
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_without_scales)
    flagged: Any = model
    flagged.is_loaded_in_4bit = True
    # With this, the settings of an exported model would say that its weights are packed.
    if hasattr(flagged.config, "quantization_config"):
        del flagged.config.quantization_config
    return model


def _without_scales(layer: nn.Module, weights: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the scales, which belong to no checkpoint, out of the state of a module."""
    for name in [name for name in weights if name.startswith(f"{prefix}weight.")]:
        del weights[name]


def quantized_as(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any] | None:
    """The settings by which the base is quantized again to the same numbers; None if it is not quantized."""
    if model.quantize is None:
        return None
    return {"quantize": model.quantize, "double_quant": model.double_quant, "dtype": dtype_setting(dtype)}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of bitsandbytes in a model, by name; with adapters they are base layers."""
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "Linear4bit" and not _is_adapter(m)}


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer")


def dequantized(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model without packed ones: numbers in the dtype that they had before, on the CPU.

    Args:
        weights: complete, by their names in `model`.
    """
    found = dict(weights)
    for name, layer in quantized_layers(model).items():
        key = f"{name}.weight"
        found[key] = _values(layer.weight, found[key]).cpu()
    return found


def round_matrices(model: PreTrainedModel, settings: ModelConfig) -> PreTrainedModel:
    """Gives the matrices of a plain model the values that 4 bits would leave, in place, and returns the model."""
    for name in quantized_matrices(model):
        matrix: Any = model.get_submodule(name)
        values = _values(_in_4_bits(matrix, settings).weight)
        matrix.weight = nn.Parameter(values.to(matrix.weight.device))
    return model


def _values(weight: Any, packed: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers of a weight of bitsandbytes, in the dtype that they had; `packed` in the place of its own."""
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    return dequantize_4bit((weight.data if packed is None else packed).to(state.absmax.device), state)
