"""The recipes for the longest sequences, with a tiny model on a CPU: levers, positions and adapters in one run."""

import json
import shutil

import pytest
import torch

from lrsa_ds import load
from tests.dist.launcher import rows_of, run_as_ranks, train_alone
from tests.dist.test_resume import training_rows

pytestmark = pytest.mark.dist


def test_lora_with_all_levers_and_other_positions(tmp_path):
    """`lora_8b_1gpu` as it is, but for what makes it small; the exported model knows its positions and answers."""
    output = tmp_path / "run"
    done = train_alone(
        "+recipe=lora_8b_1gpu", "model=tiny_qwen2", "model.liger_kernel=false",
        "model.random.max_position_embeddings=512", "seq_len=1024",
        "data.num_workers=0", "attention.lag_size=64", "memory.tile_size=100", "optim.num_steps=2",
        "optim.warmup_steps=1", "eval.num_examples=1", "optim=adamw_8bit", "log.wandb=disabled", f"output_dir={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory: checkpointed activations in host memory, MLPs in 11 tiles" in done.stdout
    assert "positions of the model" not in done.stderr
    assert [row["loss"] > 0 for row in rows_of(output, "train")] == [True, True]
    assert {row["retention"] for row in rows_of(output, "eval")} == {0.25, 0.125}
    saved = json.loads((output / "model" / "config.json").read_text())
    assert saved["rope_parameters"]["rope_theta"] == 2.04e6 and saved["max_position_embeddings"] == 1024
    model, tokenizer, new_cache = load(str(output / "model"), device="cpu")
    ids = torch.tensor([tokenizer("What is the pass key? " * 20).input_ids])
    assert model.generate(ids, past_key_values=new_cache(), max_new_tokens=3).shape[1] == ids.shape[1] + 3


def test_a_base_in_4_bits_is_trained_resumed_and_exported(tmp_path):
    """`qlora_8b_1gpu`, on two ranks that share each sequence; a checkpoint holds the adapters, and the same follows."""
    output = tmp_path / "run"
    command = [
        "+recipe=qlora_8b_1gpu", "model=tiny_qwen2", "model.liger_kernel=false", "seq_len=1024", "data.num_workers=0",
        "model.random.max_position_embeddings=512", "attention.lag_size=64", "memory.tile_size=100", "zero=stage2",
        "parallel.sp_size=2", "optim.num_steps=3", "optim.warmup_steps=1", "checkpoint.every=2", "eval.after=false",
        "model.lora.export=adapter", "log.wandb=disabled", f"output_dir={output}",
    ]  # fmt: skip
    done = run_as_ranks(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters in float32, matrices in nf4, on 2 × CPU" in done.stdout
    assert "memory: checkpointed activations in host memory, MLPs in 6 tiles" in done.stdout
    assert "gemm_4bit" not in done.stderr
    before, adapters = training_rows(output), (output / "model" / "adapter_model.safetensors").read_bytes()
    states = torch.load(
        output / "checkpoints" / "step_000002" / "state" / "mp_rank_00_model_states.pt", weights_only=False
    )
    assert all(".lora_" in name or name == "lm.lm_head.weight" for name in states["module"])  # the last is tied
    (output / "COMPLETED").unlink()
    shutil.rmtree(output / "checkpoints" / "step_000003")
    again = run_as_ranks(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming after step 2" in again.stdout
    assert training_rows(output) == before
    assert (output / "model" / "adapter_model.safetensors").read_bytes() == adapters
    model, tokenizer, new_cache = load(str(output / "model"), device="cpu")
    ids = torch.tensor([tokenizer("What is the pass key? " * 20).input_ids])
    assert model.generate(ids, past_key_values=new_cache(), max_new_tokens=3).shape[1] == ids.shape[1] + 3
