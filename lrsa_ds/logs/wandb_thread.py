"""Weights & Biases: whether it can be used, and the thread that owns its run."""

import os
import queue
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from lrsa_ds.errors import LRSAError, require, require_one_of
from lrsa_ds.hub import first_line
from lrsa_ds.settings.run import LogConfig

INIT_SECONDS = 20  # for W&B to reach its server
FINISH_SECONDS = 20  # for W&B to send what is left when the run ends
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
        raise LRSAError(f"the W&B key is not valid: {first_line(error)}; mend it, or use log.wandb=offline.") from error


class WandbThread(threading.Thread):
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
        except Exception as error:  # whatever happens to W&B, training continues
            self._say(f"W&B is off for the rest of this run ({first_line(error)}); metrics.jsonl is still written.")
            if run is not None:
                with suppress(Exception):
                    run.finish(exit_code=1)
        # Ends W&B's background process, which otherwise stays until this one exits. SystemExit is how it reports.
        with suppress(Exception, SystemExit):
            _import_wandb().teardown()

    def _start_run(self, wandb: ModuleType):
        # A run that resumes is the same run there.
        known = self._output_dir / RUN_ID_FILE
        if known.exists():
            self._identity |= {"id": known.read_text().strip(), "resume": "allow"}
        else:
            self._identity["id"] = uuid.uuid4().hex[:8]
        attempts = f"wandb/run-*-{self._identity['id']}"
        earlier, problem = set(self._output_dir.glob(attempts)), None
        try:
            run = self._init(wandb, self._mode)
        except (wandb.Error, TimeoutError) as error:
            if self._mode != "online":
                raise
            problem = first_line(error)
            wandb.teardown()  # its process would call the run's own identity "in use"
            # What this attempt left behind, in which nothing is recorded. No other directory of W&B is ever removed.
            for empty in set(self._output_dir.glob(attempts)) - earlier:
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
        run = wandb.init(mode=mode, dir=self._output_dir, reinit="create_new", settings=settings, **self._identity)
        (self._output_dir / RUN_ID_FILE).write_text(run.id + "\n")
        return run
