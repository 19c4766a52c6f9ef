"""A trace of some steps, for chrome://tracing or Perfetto."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lrsa_ds.errors import LRSAError

TRACE = "trace.json"


class StepProfiler:
    """Records the steps `first` to `last` (inclusive, counted from 1) on one rank, and writes a trace.

    Args:
        steps: [first, last], or empty to record nothing.
    """

    def __init__(self, steps: list[int], directory: Path):
        self._first, self._last = steps or (0, 0)
        self._path = directory / TRACE
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        """Ends the profile after its last step, and writes the trace.

        Raises:
            LRSAError: the trace cannot be written.
        """
        if self._profile is None or step != self._last:
            return
        self._profile.stop()
        try:
            self._profile.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            raise LRSAError(f"{self._path} cannot be written: {error}.") from error
        self._profile = None
