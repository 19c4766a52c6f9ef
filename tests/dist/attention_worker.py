"""One rank of a check of sequence-parallel attention: random layouts against `chunked_attention` of the whole sequence.

The argument is the number of ranks. Prints, on rank 0, JSON objects by kind of layout and exchange: lists of cases.
"""

import json
import random
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from lrsa_ds import LRSAConfig
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kernels import blocks
from lrsa_ds.attention.kernels.interval import interval_attention
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.parallel.mesh import Mesh, start_mesh, stop_mesh
from lrsa_ds.parallel.sequence import gather_kept, head_groups
from lrsa_ds.parallel.sequence.attention import attention_function
from lrsa_ds.registry import EXCHANGES, KERNELS
from tests.helpers import example

RULES = ("lagkv", "key_norm", "random", "window")
LAYER = 3


def random_case(draw: random.Random, size: int, exchange: str, rule: str) -> tuple[LRSAConfig, list[int], int, int]:
    """Settings, document lengths, query heads and KV heads; documents end anywhere, mostly not at a shard's border."""
    lag = draw.randrange(2, 12)
    config = LRSAConfig(
        sink_size=draw.randrange(0, 9), lag_size=lag, retention=draw.uniform(1.01 / lag, 1), selection=rule
    )
    least = config.dense_prefix_size
    num_tokens = size * EXCHANGES[exchange].num_stretches * draw.randrange(least, 4 * least)
    cuts = sorted(draw.sample(range(1, num_tokens), draw.randrange(0, 5)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, num_tokens], strict=True)]
    kv_heads = draw.choice([1, 2, 3, 4])
    heads = kv_heads * draw.choice([1, 2]) * (size if exchange == "head_groups" else draw.choice([1, size]))
    return config, lengths, heads, kv_heads


def gradients_of(output: torch.Tensor, inputs: list[torch.Tensor], upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output, inputs, upstream, allow_unused=True, materialize_grads=True)


def worst_errors(mesh: Mesh, exchange: str, num_cases: int) -> list[tuple[str, float]]:
    """Random cases, each with its worst relative error over output and gradients."""
    size = mesh.sp_size
    mesh = replace(mesh, sequence=replace(mesh.sequence, strategy=EXCHANGES[exchange]))
    attend = attention_function(mesh.sequence)
    torch.manual_seed(size)  # the same sequence on every rank
    draw, results = random.Random(size), []
    for number in range(num_cases):
        config, lengths, num_heads, num_kv_heads = random_case(draw, size, exchange, RULES[number % len(RULES)])
        num_tokens, dim, value_dim = sum(lengths), 8, (8, 5, 11)[number % 3]
        shapes = [(num_heads, dim), (num_kv_heads, dim), (num_kv_heads, value_dim), (num_heads, value_dim)]
        q, k, v, upstream = (torch.randn(1, heads, num_tokens, last).double() for heads, last in shapes)
        sinks = torch.randn(num_heads).double().requires_grad_()
        extras = Extras(0.3, 1.5, sinks) if number % 2 else Extras(0.3)
        shard = torch.cat([torch.arange(num_tokens)[part] for part in mesh.local_tokens(num_tokens)])
        parts = [x[:, :, shard].clone().requires_grad_() for x in (q, k, v)]
        output = attend(*parts, config, tuple(lengths), layer=LAYER, extras=extras)
        *gradients, of_sinks = gradients_of(output, [*parts, sinks], upstream[:, :, shard])
        whole = [x.requires_grad_() for x in (q, k, v)]
        expected = chunked_attention(*whole, partition_table(tuple(lengths), config), extras, LAYER)
        *wanted, wanted_of_sinks = gradients_of(expected, [*whole, sinks], upstream)
        pairs = zip((output, *gradients), (expected, *wanted), strict=True)
        # Of the whole sequence: one rank's few gradients may all be small.
        errors = [(a - e[:, :, shard]).norm().item() / e.norm().item() for a, e in pairs]
        dist.all_reduce(of_sinks)  # every rank has the part of its own queries
        errors.append((of_sinks - wanted_of_sinks).norm().item() / max(1e-30, wanted_of_sinks.norm().item()))
        sizes = f"S={config.sink_size} L={config.lag_size} K={config.num_kept} heads {num_heads}/{num_kv_heads}"
        case = f"{config.selection} {lengths} {sizes}"
        results.append((case, max(mesh.max(errors))))
    return results


def main():
    mesh = start_mesh(int(sys.argv[1]))
    plain = {exchange: worst_errors(mesh, exchange, 20) for exchange in ("gather_kept", "head_groups")}
    exec(example("An exchange"), {})
    plain["all_kv"] = worst_errors(mesh, "all_kv", 8)
    # As GPUs see it, with the kept buffer in whole blocks and several copies of it. The readable kernel takes the place
    # of FlexAttention, which has no backward pass on the CPU.
    kernel = replace(KERNELS["flex"], attend=interval_attention)
    for module in (head_groups, gather_kept):
        module.choose_kernel = lambda *_, **__: kernel
    blocks.queries_a_copy = lambda table: 1
    by_blocks = {exchange: worst_errors(mesh, exchange, 8) for exchange in ("gather_kept", "head_groups")}
    if mesh.is_main:
        print(json.dumps({"plain": plain, "by blocks": by_blocks}))
    stop_mesh()


main()
