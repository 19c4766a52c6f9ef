"""Fine-tunes a model on your own JSONL file, and asks it: `python examples/finetune_jsonl.py [rows.jsonl]`.

Without a file it writes one: texts in which a person has an object, and the question which. A row has `context`,
`question` and `answer`; README.md lists the other shapes. It runs what `python -m lrsa_ds train` would run, which
evaluates before and after training, and exports a model with its settings. More steps make it better:
`python examples/finetune_jsonl.py rows.jsonl optim.num_steps=200 seq_len=4096`.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from small_model import FETCHED, GGUF, ask

import lrsa_ds

NAMES, THINGS = ["Ada", "Bo", "Cleo", "Dag", "Eve"], ["a kite", "a key", "an orange", "a lamp", "a drum", "a map"]


def write_rows(path: Path, count: int = 64) -> None:
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            name, thing = draw.choice(NAMES), draw.choice(THINGS)
            rest = ["The train stops at every village.", "Nobody is in a hurry.", "It rains a little."] * 14
            draw.shuffle(rest)
            rest.insert(draw.randrange(len(rest)), f"{name} has {thing}.")
            row = {"context": " ".join(rest), "question": f"What does {name} have?", "answer": thing}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="a file of rows, and key=value")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_jsonl"), help="a new directory")
    options = parser.parse_args()
    files = [Path(word) for word in options.settings if "=" not in word]
    if not files:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        files = [options.output.parent / "rows.jsonl"]
        write_rows(files[0])
    settings = [
        f"model.name={FETCHED}", f"model.gguf_file={GGUF}",
        "data=files", f"data.path={files[0]}", "seq_len=512", "attention.lag_size=64", "attention.retention=0.25",
        "optim.num_steps=8", "optim.lr=1e-4", "optim.warmup_steps=2", "optim.micro_batch=1",
        "activation_checkpointing=false",
        "eval.num_examples=4", "eval.retentions=[0.25]", "log.wandb=disabled", f"output_dir={options.output}",
    ]  # fmt: skip
    settings += [word for word in options.settings if "=" in word]  # the last one counts
    subprocess.run([sys.executable, "-m", "lrsa_ds", "train", *settings], check=True)

    model, tokenizer, new_cache = lrsa_ds.load(str(options.output / "model"))
    with open(files[0]) as file:
        row = json.loads(file.readline())
    ids = ask(tokenizer, row["context"], row["question"]).to(model.device)
    cache = new_cache()
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    said = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    print(
        f"\n{row['question']}  {said!r}, from {cache.num_bytes / 1e6:.2f} MB of cache; the answer is {row['answer']!r}"
    )


if __name__ == "__main__":
    main()
