"""A model that was trained with a selection rule from outside the package, reloaded, prefilled and decoded with.

The arguments are the file that registers the rule and the model's directory. Prints a JSON object: how far prefill and
decoding are from a training pass, and how far that pass is from the one under LagKV.
"""

import json
import sys

import torch

import lrsa_ds
from lrsa_ds.layers import LayeredConfig
from recipes.user_code import import_code


@torch.no_grad()
def compare(directory: str) -> dict:
    model, _, new_cache = lrsa_ds.load(directory, device="cpu")
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


if __name__ == "__main__":
    import_code("the argument", sys.argv[1])
    print(json.dumps(compare(sys.argv[2])))
