"""One rank of checks of `optim.name=adamw_8bit` under the ZeRO stages, against AdamW and across a checkpoint.

Its argument is a directory. Prints, on rank 0, a JSON object by stage: the bytes of the states, how far the weights are
from those of AdamW, how far both have gone, and whether a run that was saved and loaded ends with the same weights.
"""

import json
import sys

import torch
from torch import nn

from lrsa_ds.config import TrainConfig
from lrsa_ds.parallel.mesh import rank, start_mesh, stop_mesh
from lrsa_ds.parallel.zero import make_engine
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.run import OptimConfig, ZeroConfig
from tests.helpers import relative_error

SIZE, STEPS = 128, 6


class Net(nn.Module):
    """Two linear layers, whose weights the optimizers take as matrices."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))

    def forward(self, x):
        return (self.layers(x) - x.flip(-1)).square().mean()


def make(stage: int, name: str):
    torch.manual_seed(0)
    optim = OptimConfig(name=name, lr=1e-3, num_steps=STEPS, warmup_steps=0, weight_decay=0.1)
    model = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
    config = TrainConfig(model=model, zero=ZeroConfig(stage=stage, gather_layers=False), optim=optim)
    return make_engine(config, Net(), torch.float32, lambda step: 1.0, [])


def train(engine, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + rank())
        engine.backward(engine(torch.randn(16, SIZE, generator=generator)))
        engine.step()


def weights(engine) -> torch.Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])


def state_bytes(engine) -> int:
    states = engine.optimizer.optimizer.state.values()
    moments = [
        state[name] for state in states for name in ("state1", "state2", "exp_avg", "exp_avg_sq") if name in state
    ]
    return sum(moment.numel() * moment.element_size() for moment in moments)


def check(stage: int, directory: str) -> dict:
    plain, small = make(stage, "adamw"), make(stage, "adamw_8bit")
    start = weights(small)
    train(plain, 0, STEPS)
    train(small, 0, STEPS)
    half = make(stage, "adamw_8bit")
    train(half, 0, STEPS // 2)
    half.save_checkpoint(directory, tag=f"stage{stage}", save_latest=False)
    resumed = make(stage, "adamw_8bit")
    resumed.load_checkpoint(directory, tag=f"stage{stage}")
    train(resumed, STEPS // 2, STEPS)
    end = weights(small)
    return {
        "bytes": state_bytes(small),
        "bytes_of_adamw": state_bytes(plain),
        "distance": relative_error(end - start, weights(plain) - start),
        "moved": (end - start).norm().item(),
        "resumed": bool(torch.equal(weights(resumed), end)),
    }


def main():
    start_mesh()
    results = {stage: check(stage, sys.argv[1]) for stage in (1, 2, 3)}
    if rank() == 0:
        print(json.dumps(results))
    stop_mesh()


main()
