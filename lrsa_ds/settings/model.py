"""Settings of the group `model`."""

from dataclasses import dataclass, field
from typing import Any

from lrsa_ds.errors import require, require_one_of, require_whole
from lrsa_ds.settings.paths import expand_home
from lrsa_ds.settings.rope import check_rope

# Forms of 4-bit numbers: the quantiles of a normal distribution, and floating point.
QUANTIZED = ("nf4", "fp4")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters through PEFT; rank 0 trains the model itself.

    Args:
        targets: "all-linear", or the names of layers, separated by commas, such as "q_proj,v_proj".
        target_parameters: parameters that are no layers, separated by commas, such as
            "experts.gate_up_proj,experts.down_proj", which hold all experts in one tensor; empty: none.
        export: "merged" (an ordinary model) or "adapter" (only the adapters, in PEFT's format).
    """

    rank: int = 0
    alpha: float = 32.0
    targets: str = "all-linear"
    target_parameters: str = ""
    export: str = "merged"

    def __post_init__(self):
        require_whole("model.lora.rank", self.rank, 0)
        require(self.alpha > 0, f"model.lora.alpha={self.alpha} is not valid: give a number above 0.")
        require_one_of("model.lora.export", self.export, ("merged", "adapter"))

    @property
    def target_names(self) -> list[str]:
        """The names in `target_parameters`."""
        return [name.strip() for name in self.target_parameters.split(",") if name.strip()]


@dataclass(kw_only=True)
class ModelConfig:
    """The model: a hub name, a local directory, a GGUF file, or random weights; and which parameters are trained.

    Args:
        quantize: "nf4" or "fp4": the frozen base of adapters in 4 bits; None: in `dtype`.
        double_quant: whether the scales of its blocks are quantized too, to 8 bits.
    """

    name: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    random: dict[str, Any] | None = field(default_factory=dict)  # an empty one is none
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    liger_kernel: bool = False
    router_aux_loss_coef: float | int | str | None = "auto"  # of a mixture of experts; auto: the model's own
    rope: dict[str, Any] = field(default_factory=dict)  # as rope_parameters of transformers; empty: the model's own
    freeze: list[str] = field(default_factory=list)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantize: str | None = None
    double_quant: bool = False

    def __post_init__(self):
        expand_home(self, "name", "tokenizer")
        self.random = self.random or None
        require(
            self.lora.rank == 0 or not self.freeze,
            "model.freeze has no effect with model.lora.rank, which trains only the adapters: set one of the two.",
        )
        require(
            self.quantize in (None, *QUANTIZED),
            f"model.quantize={self.quantize!r} is not valid: choose one of {', '.join(QUANTIZED)}, null.",
        )
        require(
            self.quantize is not None or not self.double_quant,
            f"model.double_quant=true needs model.quantize ({' or '.join(QUANTIZED)}), whose scales it quantizes.",
        )
        check_rope(self.rope)
        coefficient = self.router_aux_loss_coef
        require(
            coefficient is None or coefficient == "auto" or (not isinstance(coefficient, str) and coefficient >= 0),
            f"model.router_aux_loss_coef={coefficient} is not valid: give a number of at least 0, null (off), or auto "
            "(the model's own).",
        )
        require_one_of("model.dtype", self.dtype, ("auto", "bf16", "fp32"))
        require(
            (self.name is None) != (self.random is None),
            "model: set exactly one of model.name (a hub name or a local directory) and model.random "
            "(an architecture with random weights, such as {model_type: qwen2, ...}).",
        )
        require(self.gguf_file is None or self.name is not None, "model.gguf_file needs model.name, its directory.")
        if self.random is not None:
            require("model_type" in self.random, "model.random needs the key model_type, such as llama or qwen2.")
            require(self.tokenizer is not None, "model.random needs model.tokenizer: a name, a directory, or 'bytes'.")
