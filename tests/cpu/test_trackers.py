"""TensorBoard and MLflow, the real ones: what a run leaves there, and what is refused."""

import sys

import pytest

from lrsa_ds.errors import LRSAError
from lrsa_ds.logs.trackers import check_trackers
from lrsa_ds.settings.run import LogConfig
from tests.cpu.test_metrics import ONE_PIXEL_PNG, eval_row, make_logger, prediction_row, train_row
from tests.helpers import metrics_of


@pytest.fixture(autouse=True)
def own_tracking(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def log_a_run(directory, steps, **log):
    picture = directory / "evaluation.png"
    picture.write_bytes(ONE_PIXEL_PNG)
    logger = make_logger(directory, project="my_project", group="my_group", tags=["a"], **log)
    for step in steps:
        logger.step(train_row(step, mfu=0.4 + step / 100))
    logger.evaluation([eval_row("after", step=steps[-1])], [prediction_row("after", "42")], picture)
    logger.summary({"short_token_share": 0.25})
    logger.close()


def test_tensorboard_holds_steps_scores_tables_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_run(tmp_path, (1, 2), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/mfu")] == [(1, 0.41), (2, 0.42)]
    assert [(e.step, e.value) for e in events.Scalars("eval/passkey/exact_match@0.125")] == [(2, 50.0)]
    assert events.Tags()["images"] == ["evaluation_picture"]
    texts = {f"{name}/text_summary" for name in ("config", "evaluation", "predictions", "summary")}
    assert texts <= set(events.Tags()["tensors"])


def test_mlflow_holds_steps_scores_tables_and_settings(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    output, here = tmp_path / "output", tmp_path / "here"
    output.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    log_a_run(output, (1, 2), mlflow=True)
    log_a_run(output, (3,), mlflow=True)  # a run that resumes
    assert list(here.iterdir()) == []  # a run writes below its output directory alone
    client = MlflowClient(f"sqlite:///{output / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("my_project")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == ("my_run", "FINISHED", "my_group")
    assert (run.data.params["seq_len"], run.data.params["optim.lr"]) == ("64", "0.1")
    history = client.get_metric_history(run.info.run_id, "train/mfu")
    assert [(m.step, round(m.value, 4)) for m in history] == [(1, 0.41), (2, 0.42), (3, 0.43)]
    assert run.data.metrics["eval/passkey/exact_match:0.125"] == 50.0
    assert run.data.metrics["summary/short_token_share"] == 0.25
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "evaluation.json",
        "evaluation.png",
        "predictions.json",
    }


def test_a_server_that_is_not_there_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log_a_run(tmp_path, (1,), mlflow=True)
    assert "MLflow is off for the rest of this run" in capsys.readouterr().out
    assert [row["kind"] for row in metrics_of(tmp_path)] == ["start", "train", "eval", "summary"]


@pytest.mark.parametrize("name,package", [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("mlflow", "alembic")])
def test_a_missing_package_is_one_sentence(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LRSAError, match=rf"^log.{name}=true needs .*pip install 'lrsa-ds\[{name}\]'.*\.$"):
        check_trackers(LogConfig(wandb="disabled", **{name: True}))


def test_off_by_default():
    assert not LogConfig().tensorboard and not LogConfig().mlflow
