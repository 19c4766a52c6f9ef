"""Settings of the group `memory`: what is given in time for memory on the GPU."""

from dataclasses import dataclass

from lrsa_ds.errors import require_whole


@dataclass(kw_only=True)
class MemoryConfig:
    """Levers beside those of `zero`, `activation_checkpointing` and `loss_chunk_size`; none of them changes a result.

    Args:
        auto: whether to choose the levers, those of `zero` too, for the GPU that is found: the cheapest that fit.
        offload_checkpoints: whether checkpointed activations wait in host memory for the backward pass.
        tiled_mlp: whether the MLPs take one tile of tokens after the other.
        tile_size: tokens of a tile.
    """

    auto: bool = False
    offload_checkpoints: bool = False
    tiled_mlp: bool = False
    tile_size: int = 8192

    def __post_init__(self):
        require_whole("memory.tile_size", self.tile_size, 1)
