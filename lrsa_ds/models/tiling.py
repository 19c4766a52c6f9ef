"""Runs the gated MLP of every layer over tiles of tokens, so that only the activations of one tile are stored.

An MLP processes each token alone, so its output is the same in tiles. Each tile is checkpointed: its activations, as
wide as the MLP, are recomputed in its backward pass, and not once more when its layer is recomputed. Autograd sums the
gradients of the tiles before a parameter receives them, so ZeRO reduces each gradient once, as without tiles.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lrsa_ds.attention.saved_outputs import is_recomputing
from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError

KEY = "memory.tiled_mlp"


def check_tiling(config: TrainConfig, model: PreTrainedModel) -> None:
    """Raises LRSAError if the MLPs of `model` should be tiled but cannot be."""
    if config.memory.tiled_mlp:
        gated_mlps(model)


def num_tiles(config: TrainConfig) -> int:
    """Tiles of each MLP, of at most `memory.tile_size` tokens each; 1 if MLPs are not tiled.

    The same on every rank, whatever the length of its row: under ZeRO-3 a tile may be a collective.
    """
    if not config.memory.tiled_mlp:
        return 1
    num_tokens = config.seq_len * config.optim.micro_batch // config.parallel.sp_size
    return -(-num_tokens // config.memory.tile_size)


def describe_levers(config: TrainConfig) -> str:
    """The line about `memory` at the start of a run; empty if nothing is enabled."""
    count, offload = num_tiles(config), config.memory.offload_checkpoints
    levers = [
        *(["outputs of attention saved"] if config.memory.save_attention else []),
        *(["checkpointed activations in host memory"] if offload else []),
        *([f"MLPs in {count} tiles"] if count > 1 else []),
    ]
    if config.memory.auto:
        on_host = {key: getattr(config.zero, key) for key in ("offload_optimizer", "offload_param")}
        levers += [f"zero.{key}=cpu" for key, device in on_host.items() if device == "cpu"]
        return f"memory=auto: {', '.join(levers) or 'no lever is needed'}"
    return f"memory: {', '.join(levers)}" if levers else ""


def tile_mlps(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Runs every MLP of `model` in `count` tiles, in place, and returns the model; with one tile nothing changes."""
    for mlp in gated_mlps(model) if count > 1 else []:
        mlp.forward = _tiled(mlp, mlp.forward, count)
    return model


def _tiled(
    mlp: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], count: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    def tiled(x: torch.Tensor) -> torch.Tensor:
        # [..., N, C]. There are always `count` tiles; a row with fewer tokens has empty ones.
        tiles = x.tensor_split(count, dim=-2)
        if is_recomputing():
            return _recomputed(forward, tiles, x.requires_grad or any(p.requires_grad for p in mlp.parameters()))
        return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in tiles], dim=-2)

    return tiled


def _recomputed(
    forward: Callable[[torch.Tensor], torch.Tensor], tiles: Sequence[torch.Tensor], has_gradient: bool
) -> torch.Tensor:
    """The output of the MLP in the recomputation of its layer.

    The backward pass of a tile takes nothing of the layer but its input, and computes the rest of the tile itself. So
    all inputs are saved first: where nothing behind the MLP is saved, torch ends the recomputation with the last one.
    """
    for tile in tiles:
        checkpoint(lambda _: None, tile, use_reentrant=False)
    with torch.no_grad():
        output = torch.cat([forward(tile) for tile in tiles], dim=-2)
    return output.requires_grad_(has_gradient)


def gated_mlps(model: PreTrainedModel) -> list[nn.Module]:
    """The MLP of each decoder layer, recognised by its matrices: two from the hidden size to a width, and one back.

    Raises:
        LRSAError: a layer has no such MLP, or has experts.
    """
    size = model.config.get_text_config().hidden_size
    kinds, found = set(model._no_split_modules or ()), []
    for path, layer in model.named_modules():
        if type(layer).__name__ not in kinds or not any(hasattr(m, "layer_idx") for m in layer.modules()):
            continue
        mlps = [module for module in layer.modules() if _is_gated_mlp(module, size)]
        has_experts = any(hasattr(module, "experts") for module in layer.modules())
        if has_experts or len(mlps) != 1:
            what = "a mixture of experts" if has_experts else "no gated MLP of plain matrices"
            raise LRSAError(
                f"{KEY}=true needs one gated MLP in each layer, and {path} of {type(model).__name__} has {what}: set "
                "it to false."
            )
        found += mlps
    return found


def _is_gated_mlp(module: nn.Module, size: int) -> bool:
    """Two matrices from `size` to one width, or one to twice the width, and one back; attention has a layer_idx."""
    if hasattr(module, "layer_idx"):
        return False
    # Adapters wrap a matrix and have the same sizes.
    matrices = [child for child in module.children() if hasattr(child, "in_features")]
    sizes = [(cast(int, m.in_features), cast(int, m.out_features)) for m in matrices]
    return any(
        sorted(sizes) == sorted([*into, (width, size)])
        for width, _ in sizes
        for into in ([(size, width)] * 2, [(size, 2 * width)])
    )
