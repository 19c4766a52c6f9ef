"""What a run says while it goes: to `metrics.jsonl`, to the terminal, and to Weights & Biases.

`metrics.jsonl` is the record: each row is in it before the step is over. W&B gets the same rows from a thread of its
own, so that no server, and no server's absence, can stop or slow the training.
"""

import os
import queue
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from lrsa_ds.config import LogConfig, require, require_one_of
from lrsa_ds.errors import LRSAError
from lrsa_ds.journal import JSONLines, Progress, print_above

INIT_SECONDS = 20  # for W&B to reach its server
FINISH_SECONDS = 20  # for W&B to send what is left when the run ends
PREDICTIONS = "predictions.jsonl"
EVAL_METRICS = ("exact_match", "token_accuracy", "nll", "cache_factor")
RUN_ID_FILE = "wandb_run.txt"
CLOSE_SECONDS = 30  # for all that W&B still does when the run ends


def check_wandb(log: LogConfig) -> str:
    """What W&B will do in this run: "online", "offline" or "disabled". Needs no network.

    `log.wandb=auto` follows WANDB_MODE; without it, it is online if `wandb login` or WANDB_API_KEY left a key.

    Raises:
        LRSAError: online is asked for and there is no key, a key is malformed, or WANDB_MODE has an unknown value.
    """
    mode, asked_by = log.wandb, f"log.wandb={log.wandb}"
    variable = os.environ.get("WANDB_MODE", "")
    if mode == "auto" and variable:
        require_one_of("WANDB_MODE", variable, ("online", "offline", "disabled"))
        mode, asked_by = variable, f"WANDB_MODE={variable}"
    require(
        mode != "online" or variable not in ("offline", "disabled"),
        f"log.wandb=online contradicts WANDB_MODE={variable}: unset it, or use log.wandb=auto to follow it.",
    )
    if mode == "auto":
        return "online" if _has_key() else "offline"
    require(
        mode != "online" or _has_key(),
        f"{asked_by} needs a W&B key and found none: run `wandb login`, set WANDB_API_KEY, or use log.wandb=offline.",
    )
    return mode


def _import_wandb() -> ModuleType:
    # Its messages would tear the progress bar, and its own telemetry would hold up the exit of a process that has no
    # way to the server. Both are read from the environment, and only once.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise LRSAError(f"wandb cannot be imported ({error}): install it, or use log.wandb=disabled.") from error
    return wandb


def _has_key() -> bool:
    wandb = _import_wandb()
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise LRSAError(
            f"the W&B key is not valid: {_first_line(error)}; mend it, or use log.wandb=offline."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


class RunLogger:
    """Writes down what happens in a run, on the one rank that is `enabled`; on the others every method does nothing.

    Args:
        output_dir: an existing directory; receives `metrics.jsonl` and `wandb/`.
        config: the whole configuration of the run, as W&B shows it.
        about: what the run was made with (`lrsa_ds.provenance`): in the first row of `metrics.jsonl`, and in W&B's
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
        if not enabled:
            return
        mode = check_wandb(log)
        self._file = JSONLines(Path(output_dir) / "metrics.jsonl")
        self._file.write({"kind": "start", **about})
        self._predictions = Path(output_dir) / PREDICTIONS
        self._shows_progress = log.progress
        self._progress = Progress(num_steps) if log.progress else None
        self._evaluation: Progress | None = None
        self._eval_rows: list[dict] = []
        self._prediction_rows: list[dict] = []
        self._wandb = None
        if mode != "disabled":
            identity = {"project": log.project, "name": log.name or run_name, "group": log.group, "tags": log.tags}
            identity["config"] = config | {"run": about}
            self._wandb = _WandbThread(mode, Path(output_dir), identity, self.message)
            self._wandb.start()

    def summary(self, row: dict) -> None:
        """Records what holds of the run as a whole.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        if not self._enabled:
            return
        self._file.write({"kind": "summary", **row})
        if self._wandb:
            self._wandb.send(lambda wandb, run: run.summary.update(row))

    def step(self, row: dict) -> None:
        """Records the metrics of one optimizer step; `row["step"]` counts from 1.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        if not self._enabled:
            return
        self._file.write({"kind": "train", **row})
        if self._progress:
            self._progress.show(row)
        if self._wandb:
            values = {f"train/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
            self._wandb.send(lambda wandb, run: run.log(values))

    def evaluating(self, when: str, done: int, total: int) -> None:
        """Shows how far an evaluation is: answers done, of those under all caches."""
        if not self._enabled or not self._shows_progress:
            return
        if self._evaluation is None:
            self._evaluation = Progress(total, unit=f"evaluation ({when}): answer", leave=False)
        self._evaluation.show({"step": done})
        if done == total:
            self._evaluation.close()
            self._evaluation = None

    def evaluation(self, rows: list[dict], predictions: list[dict], picture: Path | None) -> None:
        """Records the new scores and predictions of an evaluation (`lrsa_ds.evaluation`), and a PNG of all scores.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        if not self._enabled:
            return
        for row in rows:
            self._file.write({"kind": "eval", **row})
        file = JSONLines(self._predictions)
        for row in predictions:
            file.write({"kind": "prediction", **row})
        file.close()
        self._eval_rows.extend(rows)
        self._prediction_rows.extend(predictions)
        if self._wandb:
            tables = {"evaluation": list(self._eval_rows), "predictions": list(self._prediction_rows)}
            self._wandb.send(lambda wandb, run: run.log(_evaluation_log(wandb, rows, tables, picture)))

    def results(self, rows: list[dict], pictures: dict[str, Path]) -> None:
        """Records the summary of `lrsa_ds.evaluate`: one row for each task, length and cache, and PNGs by name.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        if not self._enabled:
            return
        for row in rows:
            self._file.write({"kind": "result", **row})
        if self._wandb:
            self._wandb.send(lambda wandb, run: run.log(_results_log(wandb, rows, pictures)))

    def checkpoint(self, step: int, path: Path, waited: float, took: float) -> None:
        """Records a whole checkpoint: seconds that the training waited for it, and those until it was whole.

        Raises:
            LRSAError: the disk is full, or the file is not writable any more.
        """
        if not self._enabled:
            return
        self._file.write({"kind": "checkpoint", "step": step, "seconds": waited, "seconds_until_whole": took})
        background = f", whole after {took:.1f} s" if took > waited + 0.1 else ""
        self.message(f"checkpoint: {path} ({waited:.1f} s{background})")
        if self._wandb:
            values = {"train/step": step, "train/checkpoint_seconds": waited}
            self._wandb.send(lambda wandb, run: run.log(values))

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
    return row["prefill"] if row["prefill"] == "dense" else f"{row['prefill']}@{row['retention']:g}"


def _results_log(wandb: ModuleType, rows: list[dict], pictures: dict[str, Path]) -> dict:
    log = {f"results/{r['task']}/{r['length']}/{_cache_key(r)}/{r['metric']}": r["mean"] for r in rows}
    return log | {"results": _table(wandb, rows)} | {name: wandb.Image(str(p)) for name, p in pictures.items()}


def _evaluation_log(wandb: ModuleType, rows: list[dict], tables: dict[str, list[dict]], picture: Path | None) -> dict:
    """Scores by task and retention over `train/step`, and tables of all that was found so far."""
    log = {"train/step": rows[0]["step"]}
    log |= {f"eval/{r['task']}/{name}@{r['retention']:g}": r[name] for r in rows for name in EVAL_METRICS}
    log |= {name: _table(wandb, so_far) for name, so_far in tables.items() if so_far}
    if picture is not None:
        log["evaluation_picture"] = wandb.Image(str(picture))
    return log


class _WandbThread(threading.Thread):
    """Owns the W&B run. Rows wait in a queue while W&B looks for its server, and none is lost if it finds none."""

    def __init__(self, mode: str, output_dir: Path, identity: dict, say: Callable[[str], None]):
        super().__init__(name="wandb", daemon=True)  # daemon: it must not keep a failed process alive
        self._mode, self._output_dir, self._identity, self._say = mode, output_dir, identity, say
        self._queue = queue.SimpleQueue()
        self._exit_code = 0

    def send(self, log: Callable) -> None:
        if self.is_alive():
            self._queue.put(log)

    def close(self, failed: bool) -> None:
        self._exit_code = int(failed)
        self._queue.put(None)
        self.join(CLOSE_SECONDS)
        if self.is_alive():
            self._say(f"W&B did not end within {CLOSE_SECONDS} s and was left behind; metrics.jsonl is complete.")
            # Its first act takes back the exit handler with which W&B would wait for ever when the process ends.
            threading.Thread(target=_import_wandb().teardown, daemon=True).start()

    def run(self) -> None:
        run = None
        try:
            wandb = _import_wandb()
            run = self._start_run(wandb)
            while (log := self._queue.get()) is not None:
                log(wandb, run)
            self._finish(run)
        except Exception as error:  # whatever happens to W&B, training goes on
            self._say(f"W&B is off for the rest of this run ({_first_line(error)}); metrics.jsonl goes on.")
            with suppress(Exception):
                run.finish(exit_code=1)
        # Ends W&B's background process, which otherwise stays until this one exits. SystemExit is how it reports.
        with suppress(Exception, SystemExit):
            wandb.teardown()

    def _start_run(self, wandb: ModuleType):
        earlier, problem = set(self._output_dir.glob("wandb/run-*")), None
        try:
            run = self._init(wandb, self._mode)
        except (wandb.Error, TimeoutError) as error:
            if self._mode != "online":
                raise
            problem = _first_line(error)
            for empty in set(self._output_dir.glob("wandb/run-*")) - earlier:  # what the attempt left behind
                shutil.rmtree(empty, ignore_errors=True)
            run = self._init(wandb, "offline")
        run.define_metric("train/step")
        for group in ("train/*", "eval/*"):
            run.define_metric(group, step_metric="train/step")
        if run.offline:
            reason = f"W&B is offline ({problem})" if problem else "W&B is offline"
            self._say(f"{reason}; to send this run later: wandb sync {Path(run.dir).parent}")
        else:
            self._say(f"W&B: {run.url}")
        return run

    def _finish(self, run) -> None:
        try:
            run.finish(exit_code=self._exit_code)
        except TimeoutError:
            self._say(
                f"W&B could not send everything within {FINISH_SECONDS} s; nothing is lost, to send the rest: "
                f"wandb sync {Path(run.dir).parent}"
            )

    def _init(self, wandb: ModuleType, mode: str):
        # A run that goes on is the same run there.
        known = self._output_dir / RUN_ID_FILE
        identity = dict(self._identity)
        if known.exists():
            identity |= {"id": known.read_text().strip(), "resume": "allow"}
        settings = wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
        )
        run = wandb.init(mode=mode, dir=self._output_dir, reinit="create_new", settings=settings, **identity)
        known.write_text(run.id + "\n")
        return run
