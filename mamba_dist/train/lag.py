"""Says when the training waits for its loader, once, and when it no longer does.

Each rank judges itself: to the others a rank that waits for data looks like slow communication.
"""

import logging
from typing import Final

_log = logging.getLogger(__name__)

_BEHIND_SHARE: Final = 0.05
# So many stretches in a row without lag end it: one that comes and goes is told once.
_CALM_STRETCHES: Final = 3


class LoaderLag:
    """Whether the loader keeps up, judged over the stretches between log records."""

    def __init__(self, *, workers: int) -> None:
        self._workers = workers
        self._started = False
        self._behind = False
        self._calm = 0

    def observe(self, step: int, *, wait_s: float, step_s: float) -> None:
        """Takes the mean wait and length of the steps of a stretch that ended with `step`."""
        if not self._started:
            # The first steps wait for loader processes to start.
            self._started = True
        elif wait_s > _BEHIND_SHARE * step_s:
            self._calm = 0
            if not self._behind:
                self._behind = True
                _log.warning(
                    "the loader falls behind: the last steps up to %d waited %.0f %% of their time "
                    "for data (%.3g s of %.3g s); raise data.num_workers (now %d) up to the cores "
                    "that are free, or put the data set on a faster disk",
                    step,
                    100 * wait_s / step_s,
                    wait_s,
                    step_s,
                    self._workers,
                )
        elif self._behind:
            self._calm += 1
            if self._calm == _CALM_STRETCHES:
                self._behind = False
                _log.warning("the loader keeps up again at step %d", step)
