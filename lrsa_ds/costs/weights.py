"""The bytes of a model's weights: in the dtype of the run, or those of the frozen base in 4 bits.

bitsandbytes packs two numbers into a byte, and keeps a scale in fp32 for each block of 64 numbers. With double
quantization that scale has 8 bits, and 256 of them share one in fp32.
"""

from lrsa_ds.costs.job import Job
from lrsa_ds.costs.sizes import Sizes

FP32 = 4
BLOCK, BLOCK_OF_SCALES = 64, 256


def packed_numbers(sizes: Sizes, job: Job) -> int:
    """The numbers that are in 4 bits: those of all matrices of the layers but the adapters."""
    return sum(_frozen_matrices(sizes)) if job.quantized else 0


def _frozen_matrices(sizes: Sizes) -> list[int]:
    return [m.size for layer in sizes.shape.layers for m in layer.matrices if not m.is_trained]


def weight_bytes(sizes: Sizes, job: Job) -> int:
    """All weights, those of frozen copies too; without the scales of packed ones."""
    packed = packed_numbers(sizes, job)
    return job.itemsize * (sizes.num_parameters + job.num_frozen - packed) + packed // 2


def scale_bytes(sizes: Sizes, job: Job) -> int:
    """The scales of packed weights, which ZeRO does not shard."""
    blocks = packed_numbers(sizes, job) // BLOCK
    return blocks + FP32 * blocks // BLOCK_OF_SCALES if job.double_quant else FP32 * blocks


def gathered_bytes(sizes: Sizes, job: Job, most: int) -> int:
    """Weights that ZeRO-3 holds gathered, of at most so many parameters; it counts bytes of packed ones."""
    packed = packed_numbers(sizes, job)
    count = sizes.num_parameters + job.num_frozen - packed + packed // 2
    return weight_bytes(sizes, job) * min(count, most) // count


def dequantized_bytes(sizes: Sizes, job: Job) -> int:
    """The largest matrix that a pass dequantizes."""
    return job.itemsize * max(_frozen_matrices(sizes)) if packed_numbers(sizes, job) else 0


def dequantizing_bytes(sizes: Sizes, job: Job) -> float:
    """Bytes that are read and written in a micro-batch to dequantize matrices.

    Once for the forward pass, when it is repeated, and for the backward pass; for a tiled MLP in each of its tiles,
    which alone repeat it.
    """
    if not job.quantized:
        return 0.0
    tiles = -(-job.num_tokens // job.tile_size) if job.passes.tiled_mlp else 1
    each = job.itemsize + 0.5 + scale_bytes(sizes, job) / packed_numbers(sizes, job)
    total = 0.0
    for layer in sizes.shape.layers:
        times = 1 + len(job.taught) + layer.has_gradient * (1 + job.checkpointing)
        for matrix in (m for m in layer.matrices if not m.is_trained):
            is_tiled = matrix.in_mlp and job.passes.tiled_mlp
            of_tiles = 1 + len(job.taught) + layer.has_gradient * (2 + job.checkpointing * (not layer.ends_in_matrix))
            total += matrix.size * each * (of_tiles * tiles if is_tiled else times)
    return total
