"""The time that is left of a run, from the moment on at which its model and data are known."""

from dataclasses import dataclass

BEFORE, AFTER = "before", "after"  # the evaluations around the training
TELEMETRY = "telemetry "  # in front of them: what follows each, if telemetry is on


@dataclass
class Remaining:
    """Estimates what is left of a run, in seconds: from `seconds_of_pass` first, then from what the run has taken.

    Args:
        num_steps: training steps of the run.
        passes_of_step: forward passes of one sequence that take as long as a step; a backward pass counts as two.
        passes_of_evaluation: forward passes of one sequence in an evaluation.
        is_evaluated_before, is_evaluated_after: whether an evaluation precedes and follows the training.
        seconds_of_pass: a guess; the time of a forward pass of one sequence once passes of this run are timed.
        evaluated_every: steps between evaluations during training; 0: none.
        passes_of_telemetry: forward passes of one sequence in the telemetry after each of the two evaluations.
        first_step: steps that were completed before.
    """

    num_steps: int
    passes_of_step: float
    passes_of_evaluation: float
    is_evaluated_before: bool
    is_evaluated_after: bool
    seconds_of_pass: float
    evaluated_every: int = 0
    passes_of_telemetry: float = 0.0
    first_step: int = 0
    _measured_step: float | None = None

    @property
    def seconds_of_step(self) -> float:
        return self._measured_step or self.passes_of_step * self.seconds_of_pass

    def of_run(self) -> float:
        """All that is left before the first phase."""
        before = self.of_phase(BEFORE) + self.of_phase(TELEMETRY + BEFORE) if self.is_evaluated_before else 0.0
        return before + self.from_step(self.first_step)

    def from_step(self, step: int) -> float:
        """What is left once `step` steps are done."""
        return (self.num_steps - step) * self.seconds_of_step + self.beside_steps(step)

    def beside_steps(self, step: int) -> float:
        """What is left beside the steps themselves: evaluations between them and after the last one."""
        every, between = self.evaluated_every, 0
        # Later the time of a step, which is the mean since the first one, contains its share of an evaluation.
        if every and step <= self.first_step + every:
            between = max(0, (self.num_steps - 1) // every - step // every)
        after = self.of_phase(AFTER) + self.of_phase(TELEMETRY + AFTER) if self.is_evaluated_after else 0.0
        return between * self.of_phase("") + after

    def of_phase(self, when: str) -> float:
        """An evaluation or, if `when` begins so, telemetry."""
        passes = self.passes_of_telemetry if when.startswith(TELEMETRY) else self.passes_of_evaluation
        return passes * self.seconds_of_pass

    def after_phase(self, when: str, step: int) -> float:
        """What follows an evaluation or telemetry, at which `step` steps are done."""
        if when == AFTER:
            return self.of_phase(TELEMETRY + AFTER)
        if when == TELEMETRY + AFTER:
            return 0.0
        return self.from_step(step) + (self.of_phase(TELEMETRY + BEFORE) if when == BEFORE else 0.0)

    def measure_phase(self, when: str, seconds: float) -> None:
        """Takes into account how long an evaluation or telemetry takes in all."""
        self.seconds_of_pass *= seconds / (self.of_phase(when) or seconds)

    def measure_step(self, seconds: float) -> None:
        """Takes into account how long a step takes."""
        self._measured_step = seconds
