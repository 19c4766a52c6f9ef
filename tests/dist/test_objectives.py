"""Distillation through the real command line: trained, resumed at another number of ranks, exported."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.dist.launcher import rows_of, run_as_ranks

pytestmark = pytest.mark.dist


def test_distillation_is_trained_resumed_and_exported(tmp_path):
    """With a frozen copy under ZeRO-3 and sequence parallelism; then on one rank, from a converted checkpoint."""
    command = [
        "+recipe=smoke", "objective=distill", "objective.teacher=start", "parallel.sp_size=2", "optim.grad_accum=2",
        "log.wandb=disabled", f"output_dir={tmp_path}/run", "eval.before=false", "eval.num_examples=2",
        "checkpoint.every=2", "optim.num_steps=4",
    ]  # fmt: skip
    done = run_as_ranks(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "objective: distill from the dense pass of the start weights, weight 0.5, temperature 1" in done.stdout
    first = rows_of(tmp_path / "run", "train")
    for row in first:
        assert row["divergence"] > 0 and row["loss"] == pytest.approx((row["target_loss"] + row["divergence"]) / 2)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert not any("teacher" in name for name in weights)

    (tmp_path / "run" / "COMPLETED").unlink()
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    again = run_as_ranks(*command, "parallel.sp_size=1", num_ranks=1)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming after step 2" in again.stdout
    for before, after in zip(first, rows_of(tmp_path / "run", "train"), strict=True):
        for name in ("loss", "target_loss", "divergence", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4), name
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.allclose(resumed[name], weights[name], atol=1e-4) for name in weights)
