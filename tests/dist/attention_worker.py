"""One rank of a check of sequence-parallel attention: random layouts against `chunked_attention` of the whole sequence.

Prints, on rank 0, a JSON list of the cases, each with its worst relative error over output and gradients.
"""

import argparse
import json
import random

import torch

from lrsa_ds import LRSAConfig
from lrsa_ds.attention import blocks
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.interval import interval_attention
from lrsa_ds.parallel import heads, kept
from lrsa_ds.parallel.attention import attention_function
from lrsa_ds.parallel.mesh import start_mesh, stop_mesh
from lrsa_ds.parallel.stretches import num_stretches
from lrsa_ds.partition import partition_table


def random_case(draw: random.Random, size: int, exchange: str) -> tuple[LRSAConfig, list[int], int, int]:
    """Settings, document lengths, query heads and KV heads; documents end anywhere, mostly not at a shard's border."""
    lag = draw.randrange(2, 12)
    config = LRSAConfig(sink_size=draw.randrange(0, 9), lag_size=lag, retention=draw.uniform(1.01 / lag, 1))
    least = config.sink_size + 2 * lag
    num_tokens = size * num_stretches(exchange) * draw.randrange(least, 4 * least)
    cuts = sorted(draw.sample(range(1, num_tokens), draw.randrange(0, 5)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, num_tokens], strict=True)]
    kv_heads = draw.choice([1, 2, 3, 4])
    heads = kv_heads * draw.choice([1, 2]) * (size if exchange == "heads" else draw.choice([1, size]))
    return config, lengths, heads, kv_heads


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sp-size", type=int, required=True)
    parser.add_argument("--cases", type=int, default=25)
    parser.add_argument("--by-blocks", action="store_true", help="lay keys out as for a GPU's kernels")
    parser.add_argument("--exchange", default="kept")
    options = parser.parse_args()
    if options.by_blocks:
        # The readable kernel in the place of FlexAttention, which has no backward pass on the CPU.
        for module in (heads, kept):
            module.choose_backend, module.KERNELS = lambda *_: "flex", {"flex": interval_attention}
        blocks.queries_a_copy = lambda table: 1
    mesh = start_mesh(options.sp_size, exchange=options.exchange)
    attend = attention_function(mesh.sequence)
    torch.manual_seed(options.sp_size)  # the same sequence on every rank
    draw, results = random.Random(options.sp_size), []
    for _ in range(options.cases):
        config, lengths, num_heads, num_kv_heads = random_case(draw, options.sp_size, options.exchange)
        num_tokens, dim = sum(lengths), 8
        q, k, v, upstream = (
            torch.randn(1, h, num_tokens, dim).double() for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        )
        shard = torch.cat([torch.arange(num_tokens)[part] for part in mesh.held(num_tokens)])
        parts = [x[:, :, shard].clone().requires_grad_() for x in (q, k, v)]
        output = attend(*parts, config, tuple(lengths), 0.3)
        gradients = torch.autograd.grad(output, parts, upstream[:, :, shard])
        whole = [x.requires_grad_() for x in (q, k, v)]
        expected = chunked_attention(*whole, partition_table(tuple(lengths), config), 0.3)
        wanted = torch.autograd.grad(expected, whole, upstream)
        pairs = zip((output, *gradients), (expected, *wanted), strict=True)
        # Of the whole sequence: one rank's few gradients may all be small.
        errors = [(a - e[:, :, shard]).norm().item() / e.norm().item() for a, e in pairs]
        case = (
            f"{lengths} S={config.sink_size} L={config.lag_size} K={config.num_kept} heads {num_heads}/{num_kv_heads}"
        )
        results.append((case, max(mesh.max(errors))))
    if mesh.is_main:
        print(json.dumps(results))
    stop_mesh()


main()
