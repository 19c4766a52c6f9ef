"""Answers end where training taught it, in training, evaluation and chat: a turn's end that is not the tokenizer's."""

import json

from tests.chat_templates import TEMPLATES
from tests.chat_tokenizers import tokenizer_of
from tests.dist.launcher import rows_of, run_alone

ANSWERS = {"Paris": "It is Paris.", "Hello": "in this text", "345": "Think about it", "kind": "Be kind."}


def test_an_answer_that_is_exact_in_training_is_so_in_evaluation_and_chat(tmp_path):
    tokenizer = tokenizer_of("byte level", TEMPLATES["chatml over another eos"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"context": f"Some text {w}.", "question": f"Where is {w}?", "answer": a} for w, a in ANSWERS.items()]
    path, output = tmp_path / "rows.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=files", f"data.path={path}", f"data.validation_path={path}"]
    command = [
        "train", "+recipe=smoke", *data, "data.context_length=null", f"model.tokenizer={tmp_path}/tokenizer",
        "model.random.vocab_size=512", "attention=dense", "eval.retentions=[1.0]", "eval.before=false", "seq_len=256",
        "eval.num_examples=4", "optim.num_steps=120", f"output_dir={output}", "log.wandb=disabled",
    ]  # fmt: skip
    done = run_alone(*command)
    assert done.returncode == 0, done.stderr
    assert [row["exact_match"] for row in rows_of(output, "eval")] == [100.0]
    settings = json.loads((output / "model" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    command = [
        "evaluate", f"model.name={output}/model", "tasks=[qa]", *data, "lengths=[256]", "num_samples=4",
        "cache.prefill=[dense]", f"output_dir={tmp_path}/evaluation", "log.wandb=disabled",
    ]  # fmt: skip
    done = run_alone(*command)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "evaluation" / "results.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in results} == set(ANSWERS.values())
    assert all(row["scores"]["exact"] == 100 for row in results)
    text = tmp_path / "long.txt"
    text.write_text("Some text Hello.")
    done = run_alone("chat", str(output / "model"), str(text), "Where is Hello?")
    assert done.returncode == 0 and done.stdout.endswith("\nWhere is Hello?\n  in this text\n"), done.stdout
