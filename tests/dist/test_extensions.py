"""Extensions from outside the repository, as users start them: from a directory and with columns of their own."""

import json

import pytest

from lrsa_ds.config import load_settings
from tests.cpu.test_procedure import OWN_COLUMNS
from tests.dist.launcher import launch_command, rows_of, run
from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.dist


def test_a_procedure_from_another_directory(tmp_path):
    """Under the launcher, with a worker process for the data, and with a path relative to where one stands."""
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
    script = command.index("launch/train.py")
    command[script] = str(ROOT / "launch" / "train.py")
    done = run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")] == [1, 2, 3]
    assert {row["task"] for row in rows_of(tmp_path / "run", "eval")} == {"kind 0", "kind 1"}
    settings = load_settings(tmp_path / "run" / "config.yaml")
    assert settings["procedure"] == "tasks.py" and settings["data"]["num_workers"] == 1


def test_a_selection_rule_from_outside(tmp_path):
    """Trained with by two ranks that share each sequence, exported, reloaded, prefilled and decoded with."""
    output = run_ranks(ROOT / "tests/dist/selection_worker.py", 2, tmp_path / "run")[0]
    result = json.loads(output.strip().splitlines()[-1])
    assert result["saved"]["selection"] == "nearest"
    assert result["difference"] <= 1e-4 < result["to_lagkv"]
    rows = rows_of(tmp_path / "run", "eval")
    assert {row["when"] for row in rows} == {"before", "after"} and {row["retention"] for row in rows} > {0.125, 1.0}
    assert load_settings(tmp_path / "run" / "config.yaml")["attention"]["selection"] == "nearest"
