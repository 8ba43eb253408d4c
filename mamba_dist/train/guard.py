"""Steps that were dropped: named in the log, and bounded.

The engine drops a step whose gradient norm is not finite or above the limit, on all ranks alike.
One such step is an accident; a row of them means that training is broken and must not go on in
silence.
"""

import logging

from mamba_dist.errors import TrainingError

_log = logging.getLogger(__name__)


class SkipGuard:
    """Counts dropped steps in a row."""

    def __init__(self, limit_steps: int) -> None:
        self._limit_steps = limit_steps
        self._in_a_row = 0

    def observe(self, *, step: int, skipped: bool, grad_norm: float, samples: range) -> None:
        """Takes note of one optimizer step over the global sample positions `samples`.

        Raises:
            TrainingError: too many steps in a row were dropped.
        """
        if not skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        _log.warning(
            "step %d skipped on all ranks: gradient norm %s; samples %d to %d",
            step,
            grad_norm,
            samples.start,
            samples.stop - 1,
        )
        if self._in_a_row >= self._limit_steps:
            raise TrainingError(
                f"{self._in_a_row} steps in a row were skipped, the last one {step} with gradient "
                f"norm {grad_norm}; resume from the last checkpoint with a lower "
                "training.learning_rate, or "
                f"look at samples {samples.start} to {samples.stop - 1}"
            )
