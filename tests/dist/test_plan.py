"""`launch/plan.py` as users call it: what it prints without a GPU, and what it refuses."""

import sys

import pytest
import torch

from launch import plan
from launch.cli.accelerator import register_resolver
from launch.cli.command import run_command
from launch.cli.schema import register_schema
from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.settings import PlanConfig
from tests.dist.test_launch import refused


@pytest.fixture(autouse=True)
def schema_of_training():
    """Leaves to other tests of this process what they compose by."""
    yield
    register_schema("train", TrainConfig)
    register_resolver()


def printed(capfd, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    assert run_command(plan.action, "train", PlanConfig, on_gpu=True) == 0
    return capfd.readouterr().out


def test_a_plan_says_every_part(capfd, monkeypatch):
    settings = ["host_memory_gb=1000", "seq_len=65536", "memory.save_attention=true"]
    out = printed(capfd, monkeypatch, "+recipe=step_8b", "gpu=H200", "gpus=8", *settings)
    assert "8,030.3M parameters, 8,030.3M of them trained; on 8 × h200" in out
    parts = ["weights", "gathered weights", "gradients", "optimizer states", "activation checkpoints"]
    parts += ["one layer: attention and kept KV", "peak", "longest sequence", "ZeRO: gradients"]
    parts += ["sequence parallelism: kept", "executed: attention", "if attention were dense", "tokens/s a GPU"]
    assert [part for part in parts if part not in out] == []
    assert out.count("offload_checkpoints + tiled_mlp + offload_optimizer + offload_param") == 4  # SP sizes 1, 2, 4, 8
    assert out.endswith("recommended: the settings as they are, the cheapest of these that fit\n")


def test_a_recipe_that_prefers_a_gpu_is_planned_for_one(capfd, monkeypatch):
    """qa_smollm2 has other sizes on the CPU; figures stand in for a name, and the quotes of JSON are taken."""
    model = ["model=tiny_qwen2", "model.random.num_hidden_layers=30", "attention=dense"]
    out = printed(capfd, monkeypatch, "+recipe=qa_smollm2", *model, 'gpu={"memory_gb": 2.5}', "seq_len=32768")
    assert "no step time is estimated" in out and "on 1 × GPU of 2.5 GB" in out
    assert "does not fit" in out and "recommended, the cheapest of these that fit: parallel.sp_size=1" in out


def test_a_length_that_does_not_fit_is_refused_with_what_would(capfd, monkeypatch):
    common = ["+recipe=step_1b5", "model.lora.rank=0"]
    said = refused(capfd, monkeypatch, *common, "seq_len=4194304", command="plan")
    assert "seq_len=4194304 does not fit on 1 × h100" in said and "give at most" in said
    assert "memory.offload_checkpoints=true memory.tiled_mlp=true zero.offload_optimizer=cpu" in said
    said = refused(capfd, monkeypatch, "+recipe=step_8b", "gpus=1", "parallel.sp_size=1", "gpu=l4", command="plan")
    assert "seq_len=131072 does not fit on 1 × l4" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gpu=h1000"], "gpu=h1000 is not known: choose one of a100-40gb, a100, h100,"),
        (["gpu=null"], "gpu=None is not known: choose one of"),
        (["gpu=[h100]"], "is not known: choose one of"),
        (
            ["gpu.memory_gb=48"],
            "gpu.memory_gb is not a key of the configuration: gpu is one setting, written gpu=VALUE",
        ),
        (["gpu={peak_tflops: 40}"], "has no memory_gb"),
        (["gpu={memory_gb: 48, tflops: 40}"], "gpu.tflops is not a property of a GPU: give memory_gb, peak_tflops,"),
        (["gpu={memory_gb: none}"], "gpu.memory_gb='none' is not valid: give a number above 0"),
        (["gpus=0"], "gpus=0 is not valid: give a whole number of at least 1"),
        (["host_memory_gb=-1"], "host_memory_gb=-1.0 is not valid: give a number above 0"),
        (["gpuss=8"], "gpuss is not a key of the configuration"),
        (["gpus=3", "parallel.sp_size=2"], "parallel.sp_size=2 does not divide the 3 processes of the run"),
        (["parallel.sp_size=64"], "parallel.sp_size=64 does not divide the 4 query heads of the model"),
        (["zero=stage2", "zero.offload_param=cpu"], "zero.offload_param=cpu needs zero.stage=3"),
        (["activation_checkpointing=false", "memory=long"], "memory.offload_checkpoints=true moves what activation"),
        (["model.rope={rope_type: nonsense}"], "model.rope"),
        (["model.random.model_type=mixtral", "memory=long"], "memory.tiled_mlp=true needs one gated MLP"),
        (["compare=nowhere.csv"], "compare=nowhere.csv cannot be read"),
        (["compare=pyproject.toml"], "compare=pyproject.toml has no row of a step of smoke"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_bad_input(capfd, monkeypatch, arguments, expected):
    assert expected in refused(capfd, monkeypatch, "+recipe=smoke", *arguments, command="plan")


def test_measured_rows_are_shown_beside_the_estimates(capfd, monkeypatch):
    rows = "benchmarks/results/2026-11-25-h100/steps.csv"
    out = printed(capfd, monkeypatch, "+recipe=step_1b5", "num_targets=1024", f"compare={rows}")
    assert len(out.splitlines()) == 10 and "| 131,072 | dense (Liger) | 1 × NVIDIA H100 80GB HBM3 | 1 | none |" in out


def test_levers_are_not_chosen_without_a_gpu(capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(capfd, monkeypatch, "+recipe=smoke", "memory=auto", "data=files", "data.path=nowhere.jsonl")
    assert "memory.auto=true chooses by the memory of a GPU, and there is none" in said
    out = printed(capfd, monkeypatch, "+recipe=step_1b5", "memory=auto", "gpu={memory_gb: 48}")
    assert "levers: tiled_mlp" in out and "recommended: the settings as they are" in out
