"""Telemetry from the command line: in training in one process and in two, and of an exported model."""

import json

import pytest
from matplotlib.image import imread

from tests.dist.launcher import rows_of, run_alone, run_as_ranks, train_alone
from tests.dist.test_launch import refused
from tests.helpers import wandb_history, wandb_records

pytestmark = pytest.mark.dist

SHORT = ["optim.num_steps=2", "optim.warmup_steps=1", "eval.retentions=[1.0,0.125]"]
TELEMETRY = ["eval.telemetry=true", "eval.telemetry_examples=6", "eval.telemetry_greedy=1"]


def test_telemetry_of_a_run_and_of_its_model(tmp_path):
    output = tmp_path / "run"
    done = train_alone("+recipe=smoke", *SHORT, *TELEMETRY, f"output_dir={output}", "log.wandb=offline")
    assert done.returncode == 0, done.stderr
    rows = rows_of(output, "telemetry")
    assert [(row["when"], row["step"], row["layer"]) for row in rows] == [
        (when, step, layer) for when, step in (("before", 0), ("after", 2)) for layer in (0, 1)
    ]
    for row in rows:
        assert (row["retention"], row["num_examples"], row["num_answers_found"]) == (0.125, 6, 6)
        assert len(row["dropped_mass"]) == len(row["answer_kept"]) == 2
        assert all(0 < share < 1 for share in row["dropped_mass"])
    found = [json.loads((output / f"telemetry_{when}.json").read_text()) for when in ("before", "after")]
    losses = [layer["nll_increase"] for each in found for layer in each["layers"]]
    assert losses == [row["nll_increase"] for row in rows]
    assert done.stdout.count("telemetry: ") == 6 and "attention.layers=[{0-: 1.0}, {" in done.stdout
    for when in ("before", "after"):
        assert imread(output / f"telemetry_{when}.png").std() > 0.05
    _, last = [row for row in wandb_history(wandb_records(output)) if "telemetry_picture/path" in row]
    assert last["telemetry/nll_increase/layer_1"] == rows[-1]["nll_increase"]
    files = next(output.glob("wandb/offline-run-*")) / "files"
    assert (files / last["telemetry_picture/path"]).read_bytes() == (output / "telemetry_after.png").read_bytes()
    assert len(json.loads((files / last["telemetry/path"]).read_text())["data"]) == 4

    shared = tmp_path / "shared"
    only_before = [*SHORT, *TELEMETRY, "eval.after=false", "checkpoint.export=false"]
    done = run_as_ranks("+recipe=smoke", *only_before, f"output_dir={shared}", "log.wandb=disabled")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows_of(shared, "telemetry"), rows[:2], strict=True):
        for name, value in theirs.items():
            assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)), name

    measured = tmp_path / "measured"
    options = ["telemetry=true", "telemetry_greedy=1", "tasks=[passkey,perplexity]", "num_samples=2", "lengths=[1024]"]
    options += [f"model.name={output}/model", f"output_dir={measured}", "log.wandb=disabled"]
    done = run_alone("evaluate", *options)
    assert done.returncode == 0, done.stderr
    assert [row["layer"] for row in rows_of(measured, "telemetry")] == [0, 1]
    assert json.loads((measured / "telemetry_evaluated.json").read_text())["num_examples"] == 2
    assert "telemetry at retention 1/8 in every layer" in done.stdout and "pass 12/12" in done.stderr
    assert (measured / "telemetry_evaluated.png").exists() and not (measured / "results.txt").exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["eval.telemetry_greedy=3"], "eval.telemetry_greedy=3 is more than the layers that LRSA takes: give 0 to 2"),
        (["eval.retentions=[1.0]"], "give a number below 1 in eval.retentions"),
        (["attention=dense", "attention.lag_size=512"], "data.context_length=512 is too short"),
    ],
)
def test_what_only_the_model_or_the_data_show_is_refused(capfd, monkeypatch, tmp_path, arguments, said):
    output = [f"output_dir={tmp_path}/run", "log.wandb=disabled", "eval.telemetry=true"]
    assert said in refused(capfd, monkeypatch, "+recipe=smoke", *output, *arguments)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["telemetry=true", "cache.retentions=[1.0]"], "give a number below 1 in cache.retentions"),
        (["telemetry=true", "cache.retentions=[]", "cache.prefill=[dense]"], "a number below 1 in cache.retentions"),
        (["telemetry=true", "telemetry_greedy=9"], "telemetry_greedy=9 is more than the layers that LRSA takes"),
        (["telemetry=true", "lengths=[256]"], "lengths=256 is too short for anything to be compressed"),
        (["telemetry=true", "tasks=[perplexity]"], "the task perplexity has none"),
        (["telemetry_greedy=1"], "telemetry_greedy has no effect without telemetry"),
    ],
)
def test_what_an_evaluation_cannot_measure_is_refused(capfd, monkeypatch, tmp_path, arguments, said):
    base = ["model=tiny_qwen2", f"output_dir={tmp_path}/run", "log.wandb=disabled", "lengths=[4096]"]
    assert said in refused(capfd, monkeypatch, *base, *arguments, command="evaluate")
