"""Settings of the layers that steps take in turn, from the command line: trained, exported, evaluated."""

import json

import pytest

import lrsa_ds
from lrsa_ds.attention.partition import num_held
from tests.dist.launcher import rows_of, run_alone, run_as_ranks
from tests.dist.test_launch import refused
from tests.helpers import wandb_history, wandb_records

pytestmark = pytest.mark.dist

TURNS = 'attention.layers=[{"0-":1.0},{"0":1.0,"rest":0.0},{"1":{"retention":0.25,"lag_size":32},"rest":0.0}]'
SHORT = ["optim.num_steps=4", "eval.before=false", "eval.retentions=[1.0,0.5]", "eval.num_examples=2"]
NAMES = ["dense", "1/2", "1 dense + 1 window", "1 at 1/4 + 1 window"]


def test_trained_exported_and_evaluated(tmp_path):
    output = tmp_path / "run"
    command = ["+recipe=smoke", *SHORT, TURNS, "parallel.sp_size=2"]
    done = run_as_ranks(*command, f"output_dir={output}", "log.wandb=offline")
    assert done.returncode == 0, done.stderr
    assert "lag 64, dense, then layers 0 dense, 1 window; mean share kept 0.5, then layers 0 window, 1 " in done.stdout
    steps = rows_of(output, "train")
    assert [row["retention"] for row in steps] == [1.0, 0.5, 0.125, 1.0]
    assert ["cache_factor" in row for row in steps] == [False, True, True, False]
    rows = rows_of(output, "eval")
    assert list(dict.fromkeys(row["cache"] for row in rows)) == NAMES
    factors = {row["cache"]: row["cache_factor"] for row in rows if row["task"] == "passkey"}
    assert factors["dense"] == 1 < factors["1/2"] <= factors["1 dense + 1 window"] < factors["1 at 1/4 + 1 window"]
    table = (output / "evaluation.txt").read_text()
    assert all(name in table for name in NAMES) and "6 dense + 24 window: of the layers" in table
    charts = [row for row in wandb_history(wandb_records(output)) if "eval/passkey/nll@0.125" in row][-1]
    assert {"eval/passkey/nll@0.5", "eval/passkey/nll@1 dense + 1 window"} - charts.keys() == {"eval/passkey/nll@0.5"}

    # The scores of single answers are those of all of them.
    answers = list(map(json.loads, (output / "answers.jsonl").read_text().splitlines()))
    for row in rows:
        mine = [a for a in answers if all(a[name] == row[name] for name in ("when", "task", "cache"))]
        num_tokens = sum(a["num_tokens"] for a in mine)
        assert len(mine) == row["num_answers"] and sum(a["nll"] for a in mine) == pytest.approx(row["nll"] * num_tokens)

    # Every cache that was trained is there, without a warning.
    loaded = lrsa_ds.load(str(output / "model"), device="cpu")
    trained = lrsa_ds.trained_caches(loaded.model)
    assert [config.share_kept for config in trained] == [1.0, 0.5, 0.125]
    assert loaded.new_cache().config == trained[-1]
    evaluated = tmp_path / "evaluated"
    options = ["tasks=[passkey]", "lengths=[600]", "num_samples=1", "cache.retentions=[0.5]", "log.wandb=disabled"]
    options += ['cache.layers=[{"0-": {"retention": 0.0, "lag_size": 32}}]', f"output_dir={evaluated}"]
    done = run_alone("evaluate", f"model.name={output}/model", *options)
    assert done.returncode == 0, done.stderr
    found = {row["cache"]: row for row in rows_of(evaluated, "result") if row["metric"] == "recall"}
    assert set(found) == {"dense", "chunked 1/2", *(f"chunked {name}" for name in ("0", *NAMES[2:]))}
    samples = list(map(json.loads, (evaluated / "results.jsonl").read_text().splitlines()))
    held = {row["layers"]: row["num_held"] for row in samples if row["layers"]}
    seen = samples[0]["num_tokens"]
    assert [held[name] for name in NAMES[2:]] == [num_held(seen, config) for config in trained[1:]]
    assert "chunked 1" in (evaluated / "results.txt").read_text()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (
            ['attention.layers=[{"0-":1.0},{"0 7":1.0,"rest":0.0}]'],
            "attention.layers names layer 7, and the model has",
        ),
        (['attention.layers=[{"0":1.0},{"0-":1.0}]'], "attention.layers leaves out layer 1: the model has 2 layers"),
        (['attention.layers=[{"0-":1.0,"rest":0.0}]'], "attention.layers names every layer, so 'rest' has no layers"),
        (
            ['attention.layers=[{"0-":{"lag":3}}]'],
            "has 'lag', which is not a setting: choose retention, sink_size",
        ),
        (["attention.layers=[1.0]"], "attention.layers has 1.0 where settings by layer belong"),
        (["attention.layers=4"], "attention.layers=4 is not valid: write"),
        (['eval.layers=[{"5":1.0,"rest":0.0}]'], "eval.layers names layer 5, and the model has 2 layers"),
        (
            ["attention=dense", TURNS],
            "attention.layers has no effect under dense attention: use attention=lrsa",
        ),
        (['attention.layers=[{"0-":{"lag_size":600}}]'], "is too short for anything to be compressed"),
    ],
)
def test_what_cannot_be_honoured_is_refused(capfd, monkeypatch, tmp_path, arguments, said):
    output = [f"output_dir={tmp_path}/run", "log.wandb=disabled"]
    assert said in refused(capfd, monkeypatch, "+recipe=smoke", *output, *arguments)


def test_an_evaluation_refuses_layers_of_another_model(capfd, monkeypatch, tmp_path):
    command = ["model=tiny_qwen2", f"output_dir={tmp_path}/run", "log.wandb=disabled", "lengths=[4096]"]
    said = refused(capfd, monkeypatch, *command, 'cache.layers={"5":1.0,"rest":0.0}', command="evaluate")
    assert "cache.layers names layer 5, and the model has 2 layers" in said
