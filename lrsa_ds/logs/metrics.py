"""Logs a run to `metrics.jsonl`, to the terminal, and to Weights & Biases.

Each row is written to `metrics.jsonl` before the step ends. A thread sends the same rows to W&B, so a slow or missing
server neither stops nor slows the training.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lrsa_ds.labels import cache_of
from lrsa_ds.logs.journal import JSONLines, Progress, print_above, read_rows
from lrsa_ds.logs.wandb_thread import WandbThread, check_wandb
from lrsa_ds.settings.run import LogConfig

PREDICTIONS = "predictions.jsonl"
ANSWERS = "answers.jsonl"
EVAL_METRICS = ("exact_match", "token_accuracy", "nll", "cache_factor")


class RunLogger:
    """Logs a run on the one rank that is `enabled`; on the others every method does nothing.

    Args:
        output_dir: an existing directory; receives `metrics.jsonl` and `wandb/`.
        config: the whole configuration of the run, as W&B shows it.
        about: what the run was made with (`lrsa_ds.logs.provenance`): in the first row of `metrics.jsonl`, and in W&B's
            configuration.
        run_name: the run's name in W&B unless `log.name` gives one.
        num_steps: the step that will be the last, counted from 1.

    Raises:
        LRSAError: as `check_wandb`, or `metrics.jsonl` cannot be opened.
    """

    def __init__(
        self,
        output_dir: Path,
        log: LogConfig,
        config: dict,
        about: dict,
        run_name: str,
        num_steps: int,
        enabled: bool = True,
    ):
        self._enabled, self._closed = enabled, False
        self._progress: Progress | None = None
        self._evaluation: Progress | None = None
        self._wandb: WandbThread | None = None
        if not enabled:
            return
        mode = check_wandb(log)
        self._file = JSONLines(Path(output_dir) / "metrics.jsonl")
        self._file.write({"kind": "start", **about})
        self._output_dir = Path(output_dir)
        self._shows_progress = log.progress
        if log.progress:
            self._progress = Progress(num_steps)
        if mode != "disabled":
            identity = {"project": log.project, "name": log.name or run_name, "group": log.group, "tags": log.tags}
            identity |= {"config": config | {"run": about}}
            self._wandb = WandbThread(mode, Path(output_dir), identity, self.message)
            self._wandb.start()

    def summary(self, row: dict) -> None:
        """Records values of the whole run.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("summary", [row])
        if self._wandb:
            self._wandb.send(lambda wandb, run: run.summary.update(row))

    def step(self, row: dict) -> None:
        """Records the metrics of one optimizer step; `row["step"]` counts from 1.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("train", [row])
        if self._progress:
            self._progress.show(row)
        if self._wandb:
            values = {f"train/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
            self._wandb.send(lambda wandb, run: run.log(values))

    def evaluating(self, when: str, done: int, total: int, unit: str = "answer") -> None:
        """Shows how far an evaluation is: answers done, of those under all caches, or passes of telemetry."""
        if not self._enabled or not self._shows_progress:
            return
        if self._evaluation is None:
            self._evaluation = Progress(total, unit=f"evaluation ({when}): {unit}", leave=False)
        self._evaluation.show({"step": done})
        if done == total:
            self._evaluation.close()
            self._evaluation = None

    def evaluation(
        self, rows: list[dict], predictions: list[dict], picture: Path | None, answers: Sequence[dict] = ()
    ) -> None:
        """Records what an evaluation has found (`lrsa_ds.train.scoring.Evaluation`), and a PNG of all scores.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        if not self._enabled:
            return
        self._write("eval", rows)
        for name, kind, found in ((PREDICTIONS, "prediction", predictions), (ANSWERS, "answer", answers)):
            file = JSONLines(self._output_dir / name)
            for row in found:
                file.write({"kind": kind, **row})
            file.close()
        if self._wandb:
            # From the files: a run that was resumed shows what it found before, too.
            tables = {"evaluation": self._recorded("metrics.jsonl", "eval")}
            tables["predictions"] = self._recorded(PREDICTIONS, "prediction")
            self._wandb.send(lambda wandb, run: run.log(_evaluation_log(wandb, rows, tables, picture)))

    def results(self, rows: list[dict], predictions: list[dict], pictures: dict[str, Path]) -> None:
        """Records the summary of `lrsa_ds.evaluate`: one row for each task, length and cache, and PNGs by name.

        W&B also gets a table with some of the answers: a row for each of the `predictions`.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("result", rows)
        if self._wandb:
            tables = {"results": rows, "predictions": predictions}
            self._wandb.send(lambda wandb, run: run.log(_results_log(wandb, rows, tables, pictures)))

    def telemetry(self, rows: list[dict], picture: Path) -> None:
        """Records what each layer loses (`lrsa_ds.telemetry`): a row for each layer, and a PNG.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("telemetry", rows)
        if self._wandb:
            table = self._recorded("metrics.jsonl", "telemetry")
            self._wandb.send(lambda wandb, run: run.log(_telemetry_log(wandb, rows, table, picture)))

    def data(self, row: dict) -> None:
        """Records what is in the training data, before the first step.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("data", [row])

    def checkpoint(self, step: int, path: Path, waited: float, took: float) -> None:
        """Records a whole checkpoint: seconds that the training waited for it, and those until it was whole.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("checkpoint", [{"step": step, "seconds": waited, "seconds_until_whole": took}])
        background = f", whole after {took:.1f} s" if took > waited + 0.1 else ""
        self.message(f"checkpoint: {path} ({waited:.1f} s{background})")
        if self._wandb:
            values = {"train/step": step, "train/checkpoint_seconds": waited}
            self._wandb.send(lambda wandb, run: run.log(values))

    def _write(self, kind: str, rows: list[dict]) -> None:
        """Appends rows to `metrics.jsonl`, on the rank that is enabled."""
        if self._enabled:
            for row in rows:
                self._file.write({"kind": kind, **row})

    def _recorded(self, file: str, kind: str) -> list[dict]:
        rows = [row for row in read_rows(self._output_dir / file) if row["kind"] == kind]
        return [{name: value for name, value in row.items() if name != "kind"} for row in rows]

    def message(self, text: str) -> None:
        """Prints to stdout, above the progress bar if there is one."""
        if self._enabled:
            print_above(text)

    def close(self, failed: bool = False) -> None:
        """Ends the record within `CLOSE_SECONDS`; `failed` marks the run as such in W&B. A second call does nothing."""
        if not self._enabled or self._closed:
            return
        self._closed = True
        for progress in (self._evaluation, self._progress):
            if progress:
                progress.close()
        self._file.close()
        if self._wandb:
            self._wandb.close(failed)


def _table(wandb: ModuleType, rows: list[dict]):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])


def _cache_key(row: dict) -> str:
    share = row.get("layers") or f"{row['retention']:g}"
    return row["prefill"] if row["prefill"] == "dense" else f"{row['prefill']}@{share}"


def _results_log(wandb: ModuleType, rows: list[dict], tables: dict[str, list[dict]], pictures: dict[str, Path]) -> dict:
    log = {f"results/{r['task']}/{r['length']}/{_cache_key(r)}/{r['metric']}": r["mean"] for r in rows}
    log |= {name: _table(wandb, table) for name, table in tables.items() if table}
    return log | {name: wandb.Image(str(p)) for name, p in pictures.items()}


def _telemetry_log(wandb: ModuleType, rows: list[dict], table: list[dict], picture: Path) -> dict:
    """The loss of each layer over `train/step`, the table of all that was found so far, and the picture."""
    log = {f"telemetry/nll_increase/layer_{row['layer']}": row["nll_increase"] for row in rows}
    log |= {"train/step": rows[0]["step"], "telemetry": _table(wandb, table)}
    return log | {"telemetry_picture": wandb.Image(str(picture))}


def _share_or_name(row: dict, rows: list[dict]) -> str:
    """Identifies the cache of a row: its retention, or its name where several caches have the same retention."""
    alike = {cache_of(other) for other in rows if other["retention"] == row["retention"]}
    return f"{row['retention']:g}" if len(alike) == 1 else cache_of(row)


def _evaluation_log(wandb: ModuleType, rows: list[dict], tables: dict[str, list[dict]], picture: Path | None) -> dict:
    """Scores by task and cache over `train/step`, and tables of all that was found so far."""
    log = {"train/step": rows[0]["step"]}
    log |= {f"eval/{r['task']}/{name}@{_share_or_name(r, rows)}": r[name] for r in rows for name in EVAL_METRICS}
    log |= {name: _table(wandb, so_far) for name, so_far in tables.items() if so_far}
    if picture is not None:
        log["evaluation_picture"] = wandb.Image(str(picture))
    return log
