"""The recipes for the longest sequences, with a tiny model on a CPU: levers, positions and adapters in one run."""

import json

import pytest
import torch

from lrsa_ds import load
from tests.dist.launcher import rows_of, train_alone

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
