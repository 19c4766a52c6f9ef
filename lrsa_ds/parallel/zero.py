"""DeepSpeed's configuration and engine for a run."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.parallel.optimizers import make_optimizer


def deepspeed_config(config: TrainConfig, dtype: torch.dtype, load_universal: bool = False) -> dict:
    """DeepSpeed's configuration; every value comes from `zero.*` and `optim.*`.

    Args:
        load_universal: whether a checkpoint of another number of ranks will be loaded.
    """
    zero, optim = config.zero, config.optim
    return {
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": optim.grad_accum,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": zero.stage,
            # The factor that turns DeepSpeed's average into our sum depends on this setting (see `gradient_scale`).
            "reduce_scatter": True,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "overlap_comm": zero.overlap_comm,
            "contiguous_gradients": True,
            "offload_optimizer": {"device": zero.offload_optimizer},
            "offload_param": {"device": zero.offload_param},
        },
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def gradient_scale(config: TrainConfig, world_size: int) -> float:
    """The factor for a sum over tokens that compensates DeepSpeed's averages.

    DeepSpeed divides gradients by the number of ranks, and the loss by the number of accumulation steps.
    """
    return float(world_size * config.optim.grad_accum)


def make_engine(
    config: TrainConfig,
    model: torch.nn.Module,
    dtype: torch.dtype,
    schedule: Callable[[int], float],
    layer_classes: list[str],
    load_universal: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around `model`, with the optimizer of the run and the learning-rate factor `schedule(step)`.

    `layer_classes` names the classes of the decoder layers. Under ZeRO-3 each is gathered as a whole: DeepSpeed's hooks
    around every single module would otherwise take longer than the layers of a small model.
    """
    if config.zero.stage == 3 and config.zero.gather_layers:
        for layer in deepspeed.utils.set_z3_leaf_modules(model, layer_classes):
            layer.register_forward_pre_hook(_need_input_gradient)
    if config.zero.stage == 3 and not config.zero.gather_layers:
        for block in [*_expert_blocks(model), *_recurrent_layers(model)]:
            deepspeed.utils.set_z3_leaf_module(block, True)
            block.register_forward_pre_hook(_need_input_gradient)
    optimizer = make_optimizer(_parameter_groups(model, config.optim.weight_decay), config)

    def scheduler(wrapped: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(wrapped, schedule)

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(config, dtype, load_universal),
    )
    return engine


def _expert_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules whose experts are modules of their own, of which a pass calls only those that get a token.

    Gathering is a collective: the ranks have to gather the same experts, so each gathers all of them.
    """
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), torch.nn.ModuleList)]


def _recurrent_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers that call modules once for each document of a pass, of which ranks have different numbers."""
    return [m for m in model.modules() if hasattr(m, "recurrent_modules")]


def _need_input_gradient(layer: torch.nn.Module, args: tuple) -> tuple:
    """Hook before the pass of a layer that is gathered as a whole: its hidden states take part in the backward pass.

    DeepSpeed releases the parameters of such a layer when the gradients of its inputs are there. Behind frozen
    embeddings (LoRA, `model.freeze`) none would ask for them, and it would release them before the backward pass.
    """
    if torch.is_grad_enabled() and args and not args[0].requires_grad and _is_trained(layer):
        return args[0].detach().requires_grad_(), *args[1:]
    return args


def _is_trained(layer: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay applies to matrices, not to norms and biases, which have one dimension. One group without decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters}]
    matrices = [p for p in parameters if _num_dims(p) > 1]
    others = [p for p in parameters if _num_dims(p) <= 1]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def _num_dims(parameter: torch.nn.Parameter) -> int:
    """Dimensions of the complete parameter: under ZeRO-3 a rank holds a flat shard, which stores the true shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
