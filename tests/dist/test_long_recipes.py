"""The recipes for the longest sequences, with a tiny model on a CPU: levers, positions and adapters in one run."""

import json
import shutil

import pytest
import torch

from lrsa_ds import load
from tests.dist.launcher import rows_of, run_as_ranks
from tests.dist.test_resume import training_rows, weights_of

pytestmark = pytest.mark.dist


def test_eight_ranks_share_each_sequence(tmp_path):
    """The command of the README for eight GPUs; `zero=stage3` since DeepSpeed's CPUAdam takes a minute to compile."""
    rows = [{"messages": [{"role": "user", "content": f"{i} word " * 150}, {"role": "assistant", "content": str(i)}]}
            for i in range(12)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [
        "model=tiny_qwen2", "model.random.num_attention_heads=8", "data=files", f"data.path={tmp_path}/rows.jsonl",
        "data.name=null", "data.num_workers=0", "seq_len=1024", "attention.lag_size=16", "zero=stage3",
        "optim.grad_accum=1", "optim.num_steps=2", "optim.warmup_steps=1", "eval.before=false", "eval.num_examples=1",
        "eval.retentions=[0.125]", "log.wandb=disabled",
    ]  # fmt: skip
    output = tmp_path / "run"
    done = run_as_ranks("+recipe=qa_128k", "parallel.sp_size=8", *small, f"output_dir={output}", num_ranks=8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 × CPU, ZeRO stage 3, 8 ranks to a sequence" in done.stdout
    assert len(rows_of(output, "train")) == 2 and (output / "model").is_dir()


def test_adapters_on_4_bits_with_all_levers_and_other_positions(tmp_path):
    """`qlora_8b_1gpu`, which has all of `lora_8b_1gpu`, on two ranks; it resumes with the same result, and answers."""
    output = tmp_path / "run"
    command = [
        "+recipe=qlora_8b_1gpu", "model=tiny_qwen2", "model.liger_kernel=false",
        "model.random.max_position_embeddings=512", "seq_len=1024", "parallel.sp_size=2", "zero=stage2",
        "data.num_workers=0", "attention.lag_size=64", "memory.tile_size=100", "optim.num_steps=3",
        "checkpoint.every=2", "optim.warmup_steps=1", "eval.num_examples=1", "optim=adamw_8bit", "log.wandb=disabled",
        f"output_dir={output}",
    ]  # fmt: skip
    done = run_as_ranks(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters in float32, matrices in nf4, on 2 × CPU" in done.stdout
    assert "memory: checkpointed activations in host memory, MLPs in 6 tiles" in done.stdout
    assert "positions of the model" not in done.stderr and "gemm_4bit" not in done.stderr
    assert {row["retention"] for row in rows_of(output, "eval")} == {0.25, 0.125}
    before, weights = training_rows(output), weights_of(output)
    assert len(before) == 3 and all(row["loss"] > 0 for row in before)
    saved = json.loads((output / "model" / "config.json").read_text())
    assert saved["rope_parameters"]["rope_theta"] == 2.24e6 and saved["max_position_embeddings"] == 1024
    assert "quantization_config" not in saved and {x.dtype for x in weights.values()} == {torch.float32}
    model, tokenizer, new_cache = load(str(output / "model"), device="cpu")
    ids = torch.tensor([tokenizer("What is the pass key? " * 20).input_ids])
    assert model.generate(ids, past_key_values=new_cache(), max_new_tokens=3).shape[1] == ids.shape[1] + 3

    # A checkpoint holds the adapters; the base is drawn and quantized again.
    states = output / "checkpoints" / "step_000002" / "state" / "mp_rank_00_model_states.pt"
    names = torch.load(states, weights_only=False)["module"]
    assert all(".lora_" in name or name == "lm.lm_head.weight" for name in names)  # the last one is tied
    (output / "COMPLETED").unlink()
    shutil.rmtree(output / "checkpoints" / "step_000003")
    again = run_as_ranks(*command, "eval.after=false")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming after step 2" in again.stdout and training_rows(output) == before
    assert all(torch.equal(x, weights[name]) for name, x in weights_of(output).items())
