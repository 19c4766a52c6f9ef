"""Weights & Biases: whether it can be used, and the thread that owns its run."""

import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from lrsa_ds.errors import LRSAError, require, require_one_of
from lrsa_ds.hub import first_line
from lrsa_ds.logs.tracker import Entry, Identity, Tracker
from lrsa_ds.settings.run import LogConfig

INIT_SECONDS = 20  # for W&B to reach its server
FINISH_SECONDS = 20  # for W&B to send what is left when the run ends
RUN_ID_FILE = "wandb_run.txt"


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
            f"the W&B key is not valid: {first_line(error)}; correct it, or use log.wandb=offline."
        ) from error


class WandbThread(Tracker):
    """The W&B run. Nothing is lost if W&B finds no server."""

    service = "W&B"
    _run: Any = None

    def __init__(self, mode: str, output_dir: Path, identity: Identity, say: Callable[[str], None]):
        super().__init__(output_dir, identity, say)
        self._mode, self._settings = mode, asdict(identity)

    def begin(self) -> None:
        self._run = self._start_run(_import_wandb())

    def write(self, entry: Entry) -> None:
        wandb = _import_wandb()
        log: dict[str, Any] = dict(entry.values)
        log |= {name: _table(wandb, rows) for name, rows in entry.tables.items() if rows}
        log |= {name: wandb.Image(str(path)) for name, path in entry.pictures.items()}
        if log:
            self._run.log(log | ({} if entry.step is None else {"train/step": entry.step}))
        if entry.summary:
            self._run.summary.update(dict(entry.summary))

    def finish(self) -> None:
        try:
            self._run.finish(exit_code=int(self.failed))
        except TimeoutError:
            self.say(
                f"W&B could not send everything within {FINISH_SECONDS} s; nothing is lost, to send the rest: "
                f"wandb sync {Path(self._run.dir).parent}"
            )

    def give_up(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)

    def clean_up(self) -> None:
        # Ends W&B's background process, which otherwise stays until this one exits.
        _import_wandb().teardown()

    def left_behind(self) -> None:
        # Its first act takes back the exit handler with which W&B would wait for ever when the process ends.
        threading.Thread(target=_import_wandb().teardown, daemon=True).start()

    def _start_run(self, wandb: ModuleType):
        # A run that resumes is the same run there, also if it was killed while W&B started.
        file = self.output_dir / RUN_ID_FILE
        known = file.read_text().strip() if file.exists() else ""
        if known:
            self._settings |= {"id": known, "resume": "allow"}
        else:
            self._settings["id"] = uuid.uuid4().hex[:8]
            file.write_text(self._settings["id"] + "\n")
        attempts = f"wandb/run-*-{self._settings['id']}"
        earlier, problem = set(self.output_dir.glob(attempts)), None
        try:
            run = self._init(wandb, self._mode)
        except (wandb.Error, TimeoutError) as error:
            if self._mode != "online":
                raise
            problem = first_line(error)
            wandb.teardown()  # its process would call the run's own identity "in use"
            # What this attempt left behind, in which nothing is recorded. No other directory of W&B is ever removed.
            for empty in set(self.output_dir.glob(attempts)) - earlier:
                shutil.rmtree(empty, ignore_errors=True)
            run = self._init(wandb, "offline")
        run.define_metric("train/step")
        for group in ("train/*", "eval/*"):
            run.define_metric(group, step_metric="train/step")
        if run.offline:
            reason = f"W&B is offline ({problem})" if problem else "W&B is offline"
            self.say(f"{reason}; to send this run later: wandb sync {Path(run.dir).parent}")
        else:
            self.say(f"W&B: {run.url}")
        return run

    def _init(self, wandb: ModuleType, mode: str):
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
        return wandb.init(mode=mode, dir=self.output_dir, reinit="create_new", settings=settings, **self._settings)


def _table(wandb: ModuleType, rows: list[dict]):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
