"""Logs a run to `metrics.jsonl`, to the terminal, and to W&B, TensorBoard and MLflow.

Each row is written to `metrics.jsonl` before the step ends. Threads send the same rows to the others, so a slow or
missing server neither stops nor slows the training.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lrsa_ds.labels import cache_of
from lrsa_ds.logs.journal import JSONLines, Progress, print_above, read_rows
from lrsa_ds.logs.remaining import BEFORE, TELEMETRY, Remaining
from lrsa_ds.logs.tracker import Entry, Identity, Tracker
from lrsa_ds.logs.trackers import check_trackers, start_trackers
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
        LRSAError: as `check_trackers`, or `metrics.jsonl` cannot be opened.
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
        self._remaining: Remaining | None = None
        self._last_step = 0
        self._trackers: list[Tracker] = []
        if not enabled:
            return
        check_trackers(log)
        self._file = JSONLines(Path(output_dir) / "metrics.jsonl")
        self._file.write({"kind": "start", **about})
        self._output_dir = Path(output_dir)
        self._shows_progress = log.progress
        if log.progress:
            self._progress = Progress(num_steps)
        identity = Identity(
            project=log.project,
            name=log.name or run_name,
            group=log.group,
            tags=log.tags,
            config=config | {"run": about},
        )
        self._trackers = start_trackers(log, self._output_dir, identity, self.message)

    def expect(self, remaining: Remaining) -> None:
        """From here on, progress also shows the time that is left of the whole run."""
        self._remaining, self._last_step = remaining, remaining.first_step
        if self._enabled and self._progress:
            self._progress.announce("loading the model", remaining.of_run())
            self._progress.later = self._beside_steps
            self._progress.expected = remaining.seconds_of_step

    def summary(self, row: dict) -> None:
        """Records values of the whole run.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("summary", [row])
        self._send(Entry(summary=row))

    def step(self, row: dict) -> None:
        """Records the metrics of one optimizer step; `row["step"]` counts from 1.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("train", [row])
        self._last_step = row["step"]
        if self._progress:
            self._progress.show(row)
        values = {f"train/{k}": v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        self._send(Entry(values=values, step=row["step"]))

    def evaluating(self, when: str, done: int, total: int, unit: str = "answer") -> None:
        """Shows how far an evaluation is: answers done, of those under all caches, or passes of telemetry."""
        if not self._enabled or not self._shows_progress:
            return
        if self._evaluation is None:
            expected = self._remaining.of_phase(when) / total if self._remaining else None
            unit = f"evaluation ({when}): {unit}"
            self._evaluation = Progress(total, unit, leave=False, expected=expected)
            self._evaluation.later = partial(self._after_phase, when, total)
        self._evaluation.show({"step": done})
        if done == total:
            self._evaluation.close()
            self._evaluation = None
            if self._progress and self._remaining and when in (BEFORE, TELEMETRY + BEFORE):
                self._progress.announce("training", self._remaining.after_phase(when, self._last_step))
                self._progress.expected = self._remaining.seconds_of_step

    def _after_phase(self, when: str, total: int, seconds_of_unit: float, done: int) -> float:
        """What is left of the run after an evaluation, which takes so long for each unit."""
        if self._remaining is None:
            return 0.0
        if done:
            self._remaining.measure_phase(when, total * seconds_of_unit)
        return self._remaining.after_phase(when, self._last_step)

    def _beside_steps(self, seconds_of_step: float, step: int) -> float:
        if self._remaining is None:
            return 0.0
        self._remaining.measure_step(seconds_of_step)
        return self._remaining.beside_steps(step)

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
        if self._trackers:
            # From the files: a run that was resumed shows what it found before, too.
            tables = {"evaluation": self._recorded("metrics.jsonl", "eval")}
            tables["predictions"] = self._recorded(PREDICTIONS, "prediction")
            self._send(_evaluation_entry(rows, tables, picture))

    def results(self, rows: list[dict], predictions: list[dict], pictures: dict[str, Path]) -> None:
        """Records the summary of `lrsa_ds.evaluate`: one row for each task, length and cache, and PNGs by name.

        Trackers also get a table with some of the answers: a row for each of the `predictions`.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("result", rows)
        values = {f"results/{r['task']}/{r['length']}/{_cache_key(r)}/{r['metric']}": r["mean"] for r in rows}
        tables = {"results": rows, "predictions": predictions}
        self._send(Entry(values=values, tables=tables, pictures=pictures))

    def telemetry(self, rows: list[dict], picture: Path) -> None:
        """Records what each layer loses (`lrsa_ds.telemetry`): a row for each layer, and a PNG.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        self._write("telemetry", rows)
        if self._trackers:
            values = {f"telemetry/nll_increase/layer_{row['layer']}": row["nll_increase"] for row in rows}
            tables = {"telemetry": self._recorded("metrics.jsonl", "telemetry")}
            pictures = {"telemetry_picture": picture}
            self._send(Entry(values=values, step=rows[0]["step"], tables=tables, pictures=pictures))

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
        self._send(Entry(values={"train/checkpoint_seconds": waited}, step=step))

    def _send(self, entry: Entry) -> None:
        for tracker in self._trackers:
            tracker.send(entry)

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
        """Ends the record within `CLOSE_SECONDS`; `failed` marks the run as such. A second call does nothing."""
        if not self._enabled or self._closed:
            return
        self._closed = True
        for progress in (self._evaluation, self._progress):
            if progress:
                progress.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close(failed)


def _cache_key(row: dict) -> str:
    share = row.get("layers") or f"{row['retention']:g}"
    return row["prefill"] if row["prefill"] == "dense" else f"{row['prefill']}@{share}"


def _share_or_name(row: dict, rows: list[dict]) -> str:
    """Identifies the cache of a row: its retention, or its name where several caches have the same retention."""
    alike = {cache_of(other) for other in rows if other["retention"] == row["retention"]}
    return f"{row['retention']:g}" if len(alike) == 1 else cache_of(row)


def _evaluation_entry(rows: list[dict], tables: dict[str, list[dict]], picture: Path | None) -> Entry:
    """Scores by task and cache, and tables of all that was found so far."""
    values = {f"eval/{r['task']}/{name}@{_share_or_name(r, rows)}": r[name] for r in rows for name in EVAL_METRICS}
    pictures = {} if picture is None else {"evaluation_picture": picture}
    return Entry(values=values, step=rows[0]["step"], tables=tables, pictures=pictures)
