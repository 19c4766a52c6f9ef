"""One rank of a run with a selection rule from outside the package, and with layers that differ.

The model is trained, exported, reloaded, prefilled and decoded with.

The argument is the output directory. Prints, on rank 0, a JSON object: how far prefill and decoding with the exported
model are from a training pass of it, and how far that pass is from the one under LagKV.
"""

import json
import sys

import torch
from hydra import compose, initialize_config_dir

import lrsa_ds
import recipes
from launch.cli.accelerator import register_resolver
from launch.cli.schema import register_schema
from lrsa_ds.config import TrainConfig, typed_config
from lrsa_ds.layers import LayeredConfig
from lrsa_ds.parallel.mesh import rank
from lrsa_ds.train.run import train
from tests.helpers import ROOT


def nearest_to_the_reference(candidates):
    """The tokens whose keys point where those of the next partition point on average."""
    mean = candidates.key_reference.float().mean(dim=-2, keepdim=True)
    return (candidates.keys.float() * mean).sum(dim=-1)


def settings(directory: str) -> TrainConfig:
    register_resolver()
    register_schema("train", TrainConfig)
    overrides = ["+recipe=smoke", f"output_dir={directory}", "attention.selection=nearest", "parallel.sp_size=2"]
    overrides += ["attention.layers={0: null, 1: 0.5}"]
    overrides += ["model.dtype=fp32", "optim.num_steps=2", "eval.num_examples=1", "log.wandb=disabled"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed_config(compose("train", overrides))


@torch.no_grad()
def compare(directory: str) -> dict:
    model, _, new_cache = lrsa_ds.load(f"{directory}/model", device="cpu")
    ids, cache = torch.randint(1, 300, (1, 600)), new_cache()
    expected = model(ids, use_cache=False).logits
    parts = [lrsa_ds.prefill(model, ids[:, :500], cache)[:, None]]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(500, 600)]
    difference = (torch.cat(parts, dim=1) - expected[:, 499:]).abs().max().item()
    layers = [lrsa_ds.LRSAConfig(**layer | {"selection": "lagkv"}) for layer in model.config.lrsa["layers"]]
    lagkv = LayeredConfig(tuple(layers))
    other = (model(ids, use_cache=False, lrsa_config=lagkv).logits - expected).abs().max().item()
    held = [layer.keys.shape[2] for layer in cache.layers]
    return {"saved": model.config.lrsa["layers"], "difference": difference, "to_lagkv": other, "held": held}


def main():
    rule = lrsa_ds.SelectionRule(score=nearest_to_the_reference, reads=("keys", "reference"))
    lrsa_ds.register_selection("nearest", rule)
    train(settings(sys.argv[1]), recipes.load_procedure("qa"), [])
    if rank() == 0:
        print(json.dumps(compare(sys.argv[1])))


main()
