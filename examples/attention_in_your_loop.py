"""LRSA attention alone, in a model and a training loop of your own: `python examples/attention_in_your_loop.py`.

A transformer of two layers learns to predict the bytes of a text. Each pass attends to 1,024 tokens through the sink,
what is kept of earlier partitions, and the window. Nothing but `lrsa_attention` comes from lrsa_ds.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import lrsa_ds

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 32, 1024


def rotated(x_BHND: torch.Tensor) -> torch.Tensor:
    """Rotary positions: keys that are kept keep the positions that they were written with."""
    half = x_BHND.shape[-1] // 2
    angles = torch.arange(x_BHND.shape[-2])[:, None] / 10000 ** (torch.arange(half) / half)
    a, b = x_BHND[..., :half], x_BHND[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Block(nn.Module):
    """Grouped-query attention and an MLP, each behind a norm."""

    def __init__(self, config: lrsa_ds.LRSAConfig):
        super().__init__()
        width = HEADS * DIM
        self.config = config
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.queries = nn.Linear(width, HEADS * DIM, bias=False)
        self.keys_and_values = nn.Linear(width, 2 * KV_HEADS * DIM, bias=False)
        self.output = nn.Linear(HEADS * DIM, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        normed = self.norms[0](x_BNC)
        q = self.queries(normed).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = self.keys_and_values(normed).unflatten(-1, (2, KV_HEADS, DIM)).permute(2, 0, 3, 1, 4)
        attended = lrsa_ds.lrsa_attention(rotated(q), rotated(k), v, self.config)
        x_BNC = x_BNC + self.output(attended.transpose(1, 2).flatten(2))
        return x_BNC + self.mlp(self.norms[1](x_BNC))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    # Any text will do: this is the source of Python's json module, a few times over.
    source = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    text = torch.tensor(list(source))
    config = lrsa_ds.LRSAConfig(sink_size=16, lag_size=64, retention=0.25)
    model = nn.Sequential(
        nn.Embedding(256, HEADS * DIM),
        Block(config),
        Block(config),
        nn.RMSNorm(HEADS * DIM),
        nn.Linear(HEADS * DIM, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        start = int(torch.randint(len(text) - TOKENS - 1, ()))
        window = text[start : start + TOKENS + 1]
        loss = F.cross_entropy(model(window[None, :-1])[0], window[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.3f} nats per byte", flush=True)
    kept = config.sink_size + config.num_kept * ((TOKENS - config.sink_size) // config.lag_size - 1)
    print(
        f"the last chunk saw {kept} tokens of the past and at most {2 * config.lag_size} in its window, of {TOKENS:,}"
    )


if __name__ == "__main__":
    main()
