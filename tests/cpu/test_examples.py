"""The examples, run as a reader runs them, from another directory; those that use a model with a tiny random one."""

import json
import re
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.settings.model import ModelConfig
from tests.dist.launcher import ENV, rows_of
from tests.forked import run_forked
from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
HERE = ENV | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=320)
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).save_pretrained(folder)
    load_tokenizer(ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")).save_pretrained(folder)
    return folder


def test_every_example_is_listed_and_run():
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} - {"small_model.py"}
    mine = (ROOT / "tests/cpu/test_examples.py").read_text()
    assert listed == there and all(f'"{name}"' in mine for name in there)


@pytest.mark.parametrize(
    "name,arguments,said",
    [
        ("attention_in_your_loop.py", ["--steps", "10"], r"step  10  loss [234]\.\d+ nats per byte"),
        ("generate_compressed.py", ["--max-new-tokens", "2"], r"compressed: .*\n  \d\.\d\d MB of cache"),
        (
            "ask_many_questions.py",
            ["--max-new-tokens", "2"],
            r"read [\d,]+ tokens in .*\n(What does \w+ have\?  '.*\n){3}",
        ),
    ],
)
def test_an_example_in_one_process(tmp_path, tiny, name, arguments, said):
    model = [] if "loop" in name else ["--model", str(tiny)]
    (done,) = run_forked(str(EXAMPLES / name), [([*arguments, *model], HERE)], tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(said, done.stdout), done.stdout


def test_fine_tuning_on_ones_own_rows(tmp_path, tiny):
    few = [
        f"model.name={tiny}",
        "model.gguf_file=null",
        "optim.num_steps=2",
        "optim.warmup_steps=1",
        "eval.num_examples=1",
    ]
    few += ["seq_len=1024", "model.dtype=fp32"]  # a text has more bytes than tokens
    (done,) = run_forked(str(EXAMPLES / "finetune_jsonl.py"), [(few, HERE)], tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows_of(tmp_path / "outputs" / "finetune_jsonl", "train")) == 2
    assert re.search(r"have\?  .* MB of cache; the answer is 'a", done.stdout), done.stdout


def test_the_notebook(tmp_path):
    """Its cells one after the other, as a script."""
    cells = json.loads((EXAMPLES / "walk_through.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")  # as it looks when it was run
    (tmp_path / "cells.py").write_text("\n\n".join(code))
    (done,) = run_forked(str(tmp_path / "cells.py"), [([], HERE | {"MPLBACKEND": "agg"})], tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_sweep_and_its_comparison(tmp_path):
    """Three runs under the launcher: about a minute."""
    command = [sys.executable, str(EXAMPLES / "sweep_and_compare.py")]
    done = subprocess.run(command, cwd=tmp_path, env=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs/sweep_and_compare/comparison/comparison.png").is_file()
    assert (tmp_path / "outputs/sweep_and_compare/sweep/sweep.png").is_file()
