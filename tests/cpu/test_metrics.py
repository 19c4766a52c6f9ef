"""What a run leaves in metrics.jsonl and in W&B, with the real client and without a network."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from lrsa_ds.errors import LRSAError
from lrsa_ds.logs.metrics import RunLogger
from lrsa_ds.logs.wandb_thread import check_wandb
from lrsa_ds.settings.run import LogConfig
from tests.helpers import ROOT, metrics_of, wandb_history, wandb_records

KEY = "a" * 40
NO_SERVER = "http://127.0.0.1:9"
ABOUT = {"step": 0, "world_size": 2}
ONE_PIXEL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cfc0f01f0005050102a2d0b9a70000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch, tmp_path):
    """No key, no setting and no session of W&B but those that the test makes."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    # As wandb_thread.py sets them, but undone after the test.
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def make_logger(output_dir, num_steps=3, enabled=True, **log):
    log = LogConfig(**{"wandb": "disabled", **log})
    return RunLogger(output_dir, log, {"seq_len": 64, "optim": {"lr": 0.1}}, ABOUT, "my_run", num_steps, enabled)


def train_row(step, **other):
    row = {"step": step, "loss": 2.345, "grad_norm": 1.5, "lr": 1e-4, "num_tokens": 8192, "num_target_tokens": 99}
    return {**row, "tokens_per_second": 17204.4, "step_seconds": 0.5, "peak_memory_gb": 21.3, **other}


def eval_row(when, step=0, task="passkey", retention=0.125, exact_match=50.0):
    scores = {"exact_match": exact_match, "token_accuracy": 75.0, "nll": 0.5, "num_examples": 48}
    return {"when": when, "step": step, "task": task, "retention": retention, "cache_factor": 4.27, **scores}


def prediction_row(when, prediction):
    row = {"when": when, "task": "passkey", "retention": 0.125, "exact": prediction == "42"}
    return {**row, "prompt": "What is the pass key?", "answer": "42", "prediction": prediction}


def wandb_core_processes():
    return [child for child in psutil.Process().children() if "wandb-core" in child.name()]


def test_rows_are_in_metrics_jsonl_as_soon_as_they_are_given(tmp_path):
    logger = make_logger(tmp_path)
    logger.step(train_row(1))
    assert metrics_of(tmp_path) == [{"kind": "start", **ABOUT}, {"kind": "train", **train_row(1)}]
    logger.evaluation([eval_row("after")], [prediction_row("after", "41")], None)
    assert metrics_of(tmp_path)[2:] == [{"kind": "eval", **eval_row("after")}]
    (prediction,) = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    assert prediction == {"kind": "prediction", **prediction_row("after", "41")}
    logger.close()
    logger.close()


def test_other_ranks_leave_nothing(tmp_path, capfd):
    logger = make_logger(tmp_path, enabled=False, wandb="offline")
    logger.step(train_row(1))
    logger.evaluating("after", 1, 2)
    logger.evaluation([eval_row("after")], [], None)
    logger.message("hello")
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_no_progress_if_so_configured(tmp_path, capsys):
    logger = make_logger(tmp_path, progress=False)
    logger.step(train_row(1))
    logger.message("still said")
    logger.close()
    assert capsys.readouterr() == ("still said\n", "")


def test_offline_run_holds_config_rows_table_and_picture(tmp_path, capsys):
    picture = tmp_path / "evaluation.png"
    picture.write_bytes(ONE_PIXEL_PNG)
    logger = make_logger(tmp_path, wandb="offline", project="my_project", group="my_group", tags=["a", "b"])
    logger.evaluation([eval_row("before", exact_match=0.0)], [prediction_row("before", "?")], None)
    for step in (1, 2, 3):
        logger.step(train_row(step))
    logger.evaluation([eval_row("after", step=3, exact_match=100.0)], [prediction_row("after", "42")], picture)
    logger.close()

    records = wandb_records(tmp_path)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name, run.run_group) == ("my_project", "my_run", "my_group")
    assert list(run.tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["seq_len"], config["optim"], config["run"]) == (64, {"lr": 0.1}, ABOUT)
    before, *steps, after = wandb_history(records)
    # One chart a task, metric and retention, over the steps of the training.
    steps_of = {m.name or m.glob_name: m.step_metric for m in (r.metric for r in records if r.HasField("metric"))}
    assert steps_of["eval/*"] == steps_of["train/*"] == "train/step"
    scores = {"exact_match": 0.0, "token_accuracy": 75.0, "nll": 0.5, "cache_factor": 4.27}
    assert {name: before[f"eval/passkey/{name}@0.125"] for name in scores} == scores
    assert before["train/step"] == 0
    assert [(row["train/step"], row["train/loss"]) for row in steps] == [(1, 2.345), (2, 2.345), (3, 2.345)]
    assert (after["train/step"], after["eval/passkey/exact_match@0.125"]) == (3, 100.0)
    files = next(tmp_path.glob("wandb/offline-run-*")) / "files"
    table = json.loads((files / after["evaluation/path"]).read_text())
    assert table["columns"] == list(eval_row("after"))
    assert [row[0] for row in table["data"]] == ["before", "after"]
    table = json.loads((files / after["predictions/path"]).read_text())
    assert table["columns"] == list(prediction_row("after", "42"))
    assert [row[-2:] for row in table["data"]] == [["42", "?"], ["42", "42"]]
    assert (files / after["evaluation_picture/path"]).read_bytes() == ONE_PIXEL_PNG
    (exit_code,) = (record.exit.exit_code for record in records if record.HasField("exit"))
    assert exit_code == 0
    assert wandb_core_processes() == []
    assert capsys.readouterr().out.startswith("W&B is offline; to send this run later: wandb sync ")


def test_tables_of_a_resumed_run_hold_what_was_found_before(tmp_path):
    before = make_logger(tmp_path)
    before.evaluation([eval_row("before")], [prediction_row("before", "?")], None)
    before.close()
    (tmp_path / "wandb_run.txt").write_text("abcd1234\n")  # as if killed while W&B started: its files are not there yet
    after = make_logger(tmp_path, wandb="offline")
    after.evaluation([eval_row("after", step=3)], [prediction_row("after", "42")], None)
    after.close()
    records = wandb_records(tmp_path)
    assert [record.run.run_id for record in records if record.HasField("run")] == ["abcd1234"]
    row = wandb_history(records)[-1]
    files = next(tmp_path.glob("wandb/offline-run-*")) / "files"
    for name in ("evaluation", "predictions"):
        table = json.loads((files / row[f"{name}/path"]).read_text())
        assert [values[0] for values in table["data"]] == ["before", "after"]


def test_failed_run_is_marked_so(tmp_path):
    logger = make_logger(tmp_path, wandb="offline")
    logger.close(failed=True)
    assert [record.exit.exit_code for record in wandb_records(tmp_path) if record.HasField("exit")] == [1]


def test_training_goes_on_when_wandb_breaks(tmp_path, capsys):
    logger = make_logger(tmp_path, wandb="offline")
    logger.evaluation([eval_row("before")], [], tmp_path / "there_is_no_such_picture.png")
    logger._trackers[0].join(60)
    assert not logger._trackers[0].is_alive()
    for step in (1, 2, 3):
        logger.step(train_row(step))
    logger.close()
    assert [row["kind"] for row in metrics_of(tmp_path)] == ["start", "eval", "train", "train", "train"]
    assert capsys.readouterr().out.count("W&B is off for the rest of this run") == 1
    assert wandb_core_processes() == []


def test_training_goes_on_when_the_service_of_wandb_dies(tmp_path, capsys):
    logger = make_logger(tmp_path, wandb="offline")
    while not wandb_core_processes() or "W&B is offline" not in capsys.readouterr().out:
        logger._trackers[0].join(0.05)
        assert logger._trackers[0].is_alive()
    for process in wandb_core_processes():
        process.kill()
    for step in (1, 2, 3):
        logger.step(train_row(step))
    logger.close()
    assert not logger._trackers[0].is_alive()
    assert capsys.readouterr().out.count("W&B is off for the rest of this run") == 1
    assert [row["step"] for row in metrics_of(tmp_path)] == [0, 1, 2, 3]


UNREACHABLE = """
import sys
import termios
from pathlib import Path
from lrsa_ds.logs import metrics, wandb_thread
from lrsa_ds.settings.run import LogConfig
wandb_thread.INIT_SECONDS = 2
logger = metrics.RunLogger(Path(sys.argv[1]), LogConfig(), {}, {}, "my_run", 50)
for step in range(50):
    logger.step({"step": step + 1, "loss": 1.0})
print("trained while W&B was still looking for its server:", logger._trackers[0].is_alive(), flush=True)
logger.close()
print("closed; the thread of W&B has ended:", not logger._trackers[0].is_alive())
"""


def test_unreachable_server_neither_slows_the_steps_nor_holds_the_process(tmp_path):
    env = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": NO_SERVER, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNREACHABLE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    trained, problem, closed = done.stdout.splitlines()
    assert trained.endswith(": True") and closed.endswith(": True")
    assert problem.startswith("W&B is offline (") and "wandb sync" in problem
    # All 50 rows are in the offline run, and the attempt to reach the server left no run of its own behind.
    assert [row["train/step"] for row in wandb_history(wandb_records(tmp_path))] == list(range(1, 51))


def test_disabled_never_imports_wandb(tmp_path):
    script = (
        "import sys; from pathlib import Path; from lrsa_ds.settings.run import LogConfig\n"
        "from lrsa_ds.logs.metrics import *; from lrsa_ds.logs.wandb_thread import check_wandb\n"
        "log = LogConfig(wandb='disabled'); assert check_wandb(log) == 'disabled'\n"
        f"logger = RunLogger(Path({str(tmp_path)!r}), log, {{}}, {{}}, 'my_run', 1)\n"
        "logger.step({'step': 1, 'loss': 1.0}); logger.close()\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)


@pytest.mark.parametrize(
    ("asked", "variable", "key", "mode"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, KEY, "online"),
        ("auto", "offline", KEY, "offline"),
        ("auto", "disabled", KEY, "disabled"),
        ("auto", "online", KEY, "online"),
        ("online", None, KEY, "online"),
        ("offline", "online", KEY, "offline"),
        ("disabled", "online", KEY, "disabled"),
    ],
)
def test_mode_of_wandb(monkeypatch, asked, variable, key, mode):
    for name, value in {"WANDB_MODE": variable, "WANDB_API_KEY": key}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert check_wandb(LogConfig(wandb=asked)) == mode


def test_key_of_wandb_login_is_found(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert check_wandb(LogConfig()) == "online"


@pytest.mark.parametrize(
    ("asked", "environment", "message"),
    [
        ("online", {}, "log.wandb=online needs a W&B key"),
        ("auto", {"WANDB_MODE": "online"}, "WANDB_MODE=online needs a W&B key"),
        ("auto", {"WANDB_API_KEY": "too short"}, "the W&B key is not valid"),
        ("auto", {"WANDB_MODE": "onlin"}, "choose one of online, offline, disabled"),
        ("online", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "contradicts WANDB_MODE=offline"),
    ],
)
def test_what_wandb_cannot_do_is_one_sentence(monkeypatch, asked, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LRSAError, match=message) as caught:
        check_wandb(LogConfig(wandb=asked))
    assert "\n" not in str(caught.value)
