"""The recipes for large models and long sequences, with a tiny model on a CPU."""

import json
import shutil

import pytest
import torch

from lrsa_ds import load
from tests.dist.launcher import rows_of, run_as_ranks
from tests.dist.test_contexts import squad
from tests.dist.test_resume import training_rows, weights_of

pytestmark = pytest.mark.dist


def messages(path):
    rows = [{"messages": [{"role": "user", "content": f"{i} word " * 150}, {"role": "assistant", "content": str(i)}]}
            for i in range(12)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SHORT = [
    "data.num_workers=0", "optim.grad_accum=1", "optim.micro_batch=1", "optim.num_steps=2", "optim.warmup_steps=1",
    "eval.before=false", "log.wandb=disabled",
]  # fmt: skip
# DeepSpeed's CPUAdam, for states on the host, takes a minute to compile.
LONG = ["data=files", "data.name=null", "seq_len=1024", "attention.lag_size=16", "zero=stage3", "eval.num_examples=1"]
# The layers of the recipe's caches need a model of 30.
SMOLLM2 = ["model=tiny_qwen2", "model.random.num_hidden_layers=30", "data.questions_per_context=1", "seq_len=512"]


@pytest.mark.parametrize(
    "recipe,num_ranks,small",
    [
        (
            ["+recipe=qa_128k", "parallel.sp_size=8"],
            8,
            [*LONG, "model=tiny_qwen2", "model.random.num_attention_heads=8", "eval.retentions=[0.125]"],
        ),
        (
            ["+recipe=qa_128k_1gpu"],
            1,
            [*LONG, "model=tiny_qwen2", "model.name=null", "model.random.max_position_embeddings=256"],
        ),
        (
            ["+recipe=qa_smollm2", "optim.lr=1e-4"],
            2,
            [*SMOLLM2, "data.num_examples=8", "data.tasks=[passkey]", "eval.num_examples=1"],
        ),
        (["+recipe=qa_passages"], 1, [*SMOLLM2, "eval.num_examples=4"]),
    ],
    ids=["qa_128k", "qa_128k_1gpu", "qa_smollm2", "qa_passages"],
)
def test_recipes_as_the_pages_start_them(tmp_path, recipe, num_ranks, small):
    """With a tiny model, short sequences and two steps."""
    path = squad(tmp_path / "rows.json", 16) if "qa_passages" in recipe[0] else messages(tmp_path / "rows.jsonl")
    data = [] if "+recipe=qa_smollm2" in recipe else [f"data.path={path}"]
    output = tmp_path / "run"
    done = run_as_ranks(*recipe, *data, *SHORT, *small, f"output_dir={output}", num_ranks=num_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    shared = ", 8 ranks to a sequence" if num_ranks == 8 else "\n"
    assert f"on {num_ranks} × CPU, ZeRO stage 3{shared}" in done.stdout
    assert len(rows_of(output, "train")) == 2 and rows_of(output, "eval") and (output / "model").is_dir()


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
