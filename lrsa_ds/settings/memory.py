"""Settings of the group `memory`, which trade time and GPU memory."""

from dataclasses import dataclass

from lrsa_ds.errors import require_whole


@dataclass(kw_only=True)
class MemoryConfig:
    """Settings beside `zero`, `activation_checkpointing` and `loss_chunk_size`; none of them changes a result.

    Args:
        auto: whether to choose these settings, and those of `zero`, for the present GPU: the cheapest that fit.
        save_attention: whether the outputs of attention are saved beside the checkpointed activations, and not
            recomputed.
        offload_checkpoints: whether checkpointed activations are offloaded to host memory until the backward pass.
        tiled_mlp: whether the MLPs run over tiles of tokens.
        tile_size: tokens of a tile.
    """

    auto: bool = False
    save_attention: bool = False
    offload_checkpoints: bool = False
    tiled_mlp: bool = False
    tile_size: int = 8192

    def __post_init__(self):
        require_whole("memory.tile_size", self.tile_size, 1)
