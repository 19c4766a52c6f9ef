"""MLflow: a run at MLFLOW_TRACKING_URI, or else in a database in `mlflow/` of the output directory."""

import json
import logging
import os
import re
import time
from typing import Any

from lrsa_ds.errors import LRSAError
from lrsa_ds.logs.tracker import Entry, Tracker

DIRECTORY, DATABASE = "mlflow", "mlflow.db"
RUN_ID_FILE = "mlflow_run.txt"
ADDRESS = "MLFLOW_TRACKING_URI"
LONGEST_PARAMETER = 500  # characters; servers refuse more than 6,000, older ones more than 500
MOST_AT_ONCE = 100  # parameters of a request


def check_mlflow() -> None:
    """Raises LRSAError if MLflow is not installed, or lacks what a database on this disk needs."""
    try:
        import mlflow  # noqa: F401

        if not os.environ.get(ADDRESS):
            import alembic  # noqa: F401
            import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise LRSAError(
            f"log.mlflow=true needs MLflow ({error}): pip install 'lrsa-ds[mlflow]', or set it to false."
        ) from error


class MLflow(Tracker):
    """`log.mlflow=true`. Names lose what MLflow does not allow in them: "exact_match@0.125" is "exact_match:0.125"."""

    service = "MLflow"
    _run: Any = None

    def begin(self) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its messages would tear the progress bar
        from mlflow import MlflowClient

        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
        )  # a server that is not there is given up in seconds
        address, self._artifacts = os.environ.get(ADDRESS), None
        if not address:
            folder = self.output_dir.resolve() / DIRECTORY
            folder.mkdir(exist_ok=True)
            address, self._artifacts = f"sqlite:///{folder / DATABASE}", folder.as_uri()
        self._client: Any = MlflowClient(tracking_uri=address)
        known = self.output_dir / RUN_ID_FILE
        if known.exists():  # a run that resumes is the same run there
            self._run = known.read_text().strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._start()
        known.write_text(self._run + "\n")

    def _start(self) -> str:
        from mlflow.entities import Param

        client, identity = self._client, self.identity
        found = client.get_experiment_by_name(identity.project)
        experiment = (
            found.experiment_id
            if found
            else client.create_experiment(identity.project, artifact_location=self._artifacts)
        )
        tags = dict.fromkeys(identity.tags, "") | ({"group": identity.group} if identity.group else {})
        run = client.create_run(experiment, run_name=identity.name, tags=tags).info.run_id
        settings = [Param(_allowed(key), str(v)[:LONGEST_PARAMETER]) for key, v in _flat(identity.config).items()]
        for first in range(0, len(settings), MOST_AT_ONCE):
            client.log_batch(run, params=settings[first : first + MOST_AT_ONCE])
        return run

    def write(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), entry.step or 0
        numbers = {k: v for k, v in entry.summary.items() if isinstance(v, (int, float))}
        values = {**entry.values, **{f"summary/{name}": value for name, value in numbers.items()}}
        if values:
            metrics = [Metric(_allowed(name), float(value), now, step) for name, value in values.items()]
            self._client.log_batch(self._run, metrics=metrics)
        for name, rows in entry.tables.items():
            self._client.log_text(self._run, json.dumps(rows, default=str), f"{name}.json")
        for path in entry.pictures.values():
            self._client.log_artifact(self._run, str(path))

    def finish(self) -> None:
        self._client.set_terminated(self._run, "FAILED" if self.failed else "FINISHED")

    def give_up(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, "FAILED")


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", ":"))


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, under names with dots."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
