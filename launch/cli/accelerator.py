"""`${gpu_or_cpu:A,B}` in a recipe: A with a CUDA device, B on the CPU; the choice is printed."""

import torch
from omegaconf import Node, OmegaConf

from launch.cli.naming import evaluation_name, run_name

# Sentences about the keys whose values were chosen by accelerator, by key.
PICKS: dict[str, str] = {}


def register_resolver(on_gpu: bool = False) -> None:
    """Makes the resolvers known; `on_gpu`: the settings are for a GPU that is elsewhere."""
    picked = (lambda on_gpu, on_cpu: on_gpu) if on_gpu else _gpu_or_cpu
    OmegaConf.register_new_resolver("gpu_or_cpu", picked, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("evaluation_name", evaluation_name, replace=True)


def _gpu_or_cpu(on_gpu, on_cpu, *, _node_: Node):
    use_gpu = torch.cuda.is_available()
    picked, other = (on_gpu, on_cpu) if use_gpu else (on_cpu, on_gpu)
    key = _node_._get_full_key(None)
    found, without = ("a GPU", "without") if use_gpu else ("no GPU", "on")
    PICKS[key] = f"{found} was found: {key}={picked} ({other} {without} one)"
    return picked
