"""Extensions from outside the repository, as users start them: from a directory and with columns of their own."""

import json
import sys

import pytest

from lrsa_ds.config import load_settings
from tests.cpu.test_procedure import OWN_COLUMNS
from tests.dist.launcher import launch_command, rows_of, run, run_alone, run_as_ranks
from tests.dist.test_launch import refused
from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.dist

NEAREST = """
import lrsa_ds


def score(candidates):
    '''The tokens whose keys point where those of the next partition point on average.'''
    mean = candidates.key_reference.float().mean(dim=-2, keepdim=True)
    return (candidates.keys.float() * mean).sum(dim=-1)


lrsa_ds.register_selection("nearest", lrsa_ds.SelectionRule(score=score, reads=("keys", "reference")))
"""


def test_a_procedure_from_another_directory(tmp_path):
    """Under the launcher that `python -m lrsa_ds` starts, with a worker process for the data and a relative path."""
    (tmp_path / "tasks.py").write_text(OWN_COLUMNS)
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(40):
            text = "The key is under the mat. " * 20 + str(i)
            row = {"body": text, "ask": "Where?", "reply": "under the mat", "kind": f"kind {i % 2}"}
            file.write(json.dumps(row) + "\n")
    command = launch_command(
        "+recipe=smoke", "procedure=tasks.py", "data=files", "data.path=rows.jsonl", "output_dir=run",
        "data.num_workers=1", "optim.num_steps=3", "eval.before=false", "eval.num_examples=8", "log.wandb=disabled",
        "checkpoint.export=false",
    )  # fmt: skip
    command.remove("launch/train.py")
    done = run([sys.executable, "-m", "lrsa_ds", "train", *command[1:]], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")] == [1, 2, 3]
    assert {row["task"] for row in rows_of(tmp_path / "run", "eval")} == {"kind 0", "kind 1"}
    settings = load_settings(tmp_path / "run" / "config.yaml")
    assert settings["procedure"] == "tasks.py" and settings["data"]["num_workers"] == 1


def test_a_selection_rule_from_outside(tmp_path):
    """Trained with by two ranks that share each sequence, exported, reloaded, prefilled and decoded with.

    Its two layers keep 1/8 and 1/2, of 600 tokens with a sink of 16 and partitions of 64.
    """
    plugin, output = tmp_path / "nearest.py", tmp_path / "run"
    plugin.write_text(NEAREST)
    done = run_as_ranks(
        "+recipe=smoke", f"plugins=[{plugin}]", "attention.selection=nearest", "attention.layers={0: null, 1: 0.5}",
        "parallel.sp_size=2", "model.dtype=fp32", "optim.num_steps=2", "eval.num_examples=1", "log.wandb=disabled",
        f"output_dir={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "attention: LRSA, sink 16, lag 64, layers 0 retention 0.125, 1 retention 0.5; mean share kept 0.312"
    assert said in done.stdout
    model = output / "model"
    result = json.loads(run_ranks(ROOT / "tests/dist/selection_worker.py", 1, plugin, model)[0].splitlines()[-1])
    assert [(layer["selection"], layer["retention"]) for layer in result["saved"]] == [
        ("nearest", 0.125),
        ("nearest", 0.5),
    ]
    assert result["held"] == [16 + 8 * 8 + 64 + 8, 16 + 8 * 32 + 64 + 8]
    assert result["difference"] <= 1e-4 < result["to_lagkv"]
    rows = rows_of(output, "eval")
    assert {row["when"] for row in rows} == {"before", "after"}
    assert {row["retention"] for row in rows} == {1.0, 0.5, 0.25, 0.125, 0.3125}  # the last is the mean of the layers
    assert {row["retention"] for row in rows_of(output, "train")} == {0.3125}
    settings = load_settings(output / "config.yaml")
    assert (settings["attention"]["selection"], settings["plugins"]) == ("nearest", [str(plugin)])
    evaluate = [f"model.name={model}", "tasks=[passkey]", "lengths=[512]"]
    evaluate += ["num_samples=1", "log.wandb=disabled", "cache.prefill=[chunked]", f"output_dir={tmp_path}/scores"]
    done = run_alone("evaluate", *evaluate, f"plugins=[{plugin}]")
    assert done.returncode == 0 and "passkey recall" in done.stdout, done.stdout + done.stderr


def test_plugins_that_cannot_be_imported(tmp_path, capfd, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import lrsa_ds\n\nlrsa_ds.no_such_name\n")
    said = refused(capfd, monkeypatch, "+recipe=smoke", f"plugins=[{broken}]")
    assert f"plugins: '{broken}' cannot be imported (AttributeError: " in said and "line 3)" in said
    said = refused(capfd, monkeypatch, "+recipe=smoke", "plugins=[no_such.module]", "attention.selection=nearest")
    assert "plugins: 'no_such.module' is not valid: give a module that can be imported" in said
    said = refused(capfd, monkeypatch, "+recipe=smoke", "attention.selection=unheard_of")
    assert "choose one of lagkv, key_norm, random, window" in said and "plugins" in said
