"""The time that is left of a run while it is in one of its phases: evaluation, training, evaluation."""

from dataclasses import dataclass


@dataclass
class Remaining:
    """What follows a phase of a run, in seconds, estimated from the passes that the run has made so far.

    Args:
        num_steps: training steps.
        passes_of_step: forward passes of one sequence that take as long as a step; a backward pass counts as two.
        passes_of_evaluation: forward passes of one sequence in an evaluation.
        is_evaluated_after: whether an evaluation follows the training.
    """

    num_steps: int
    passes_of_step: float
    passes_of_evaluation: float
    is_evaluated_after: bool
    _seconds_of_evaluation: float | None = None

    def after_evaluation(self, seconds: float) -> float:
        """What follows the evaluation before the training, which takes `seconds` in all."""
        self._seconds_of_evaluation = seconds
        training = self.num_steps * self.passes_of_step * seconds / self.passes_of_evaluation
        return training + seconds * self.is_evaluated_after

    def after_training(self, seconds_of_step: float) -> float:
        """What follows the training."""
        if not self.is_evaluated_after:
            return 0.0
        return self._seconds_of_evaluation or seconds_of_step * self.passes_of_evaluation / self.passes_of_step
