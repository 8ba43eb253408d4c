"""Steps that were dropped: why, named in the log, and bounded.

The engine drops a step whose gradient norm is not finite or above a limit, on all ranks alike. One
such step is an accident; a row of them means that training is broken and must not go on in silence:
see rollback.py.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.config.schema import TrainingConfig
from mamba_dist.engine.base import DROP, StepStats
from mamba_dist.engine.world import World
from mamba_dist.train.spikes import Limits, SpikeRule

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """Dropped steps in a row, counted from 0 like `Progress.step` before them, and the samples that
    they read."""

    steps: range
    samples: range
    grad_norm: float
    """Of the last of them."""

    def __str__(self) -> str:
        return (
            f"{len(self.steps)} steps in a row were skipped, the last one {self.steps.stop} with "
            f"gradient norm {self.grad_norm}"
        )


class SkipGuard:
    """Decides from which gradient norm on a step is dropped, and counts dropped steps in a row."""

    def __init__(self, config: TrainingConfig, *, world: World) -> None:
        self._spikes = SpikeRule(config.spike_sigmas, config.spike_window_steps)
        self._fixed_limit = config.skip_grad_norm_above or math.inf
        self._limit_steps = config.max_skipped_steps
        self._world = world
        self._limits = Limits(grad_norm=self._fixed_limit)
        self._row: list[range] = []

    def skip_above(self, progress: Progress, own_loss: Callable[[], float], tokens: int) -> float:
        """What `Engine.step` is to be told for the step after `progress`, over `tokens` labels.

        Where spikes are judged, the loss is summed over ranks now: the host waits for the forward
        passes instead of queueing the update behind them.
        """
        spikes = self._spikes.limits(progress)
        self._limits = Limits(spikes.loss, min(self._fixed_limit, spikes.grad_norm))
        if math.isfinite(spikes.loss):
            [loss] = self._world.sum_over_ranks([own_loss()])
            # A NaN compares false with everything, so the condition is asked the other way round.
            if not loss / max(tokens, 1) <= spikes.loss:
                return DROP
        return self._limits.grad_norm

    def observe(
        self, progress: Progress, *, loss: float, stats: StepStats, samples: range
    ) -> BadRow | None:
        """The row of dropped steps, if the last one makes it too long to go on.

        Args:
            progress: after the step.
            loss: nats per token of the step.
            samples: the global positions that it read.
        """
        if not stats.skipped:
            self._row = []
            return None
        if self._world.rank == 0:
            _log.warning(
                "step %d skipped on all ranks: %s, %s; samples %d to %d",
                progress.step,
                _shown("loss", loss, self._limits.loss),
                _shown("gradient norm", stats.grad_norm, self._limits.grad_norm),
                samples.start,
                samples.stop - 1,
            )
        self._row.append(samples)
        if len(self._row) < self._limit_steps:
            return None
        row = BadRow(
            steps=range(progress.step - len(self._row), progress.step),
            samples=range(self._row[0].start, samples.stop),
            grad_norm=stats.grad_norm,
        )
        self._row = []
        return row

    @property
    def dropped_in_row(self) -> int:
        """Steps dropped since the last applied one; 0 again once they were too many."""
        return len(self._row)

    def noted(self, progress: Progress, *, loss: float, stats: StepStats) -> Progress:
        """The progress with an applied step in the window by which spikes are judged."""
        if stats.skipped:
            return progress
        return self._spikes.after(progress, loss=loss, grad_norm=stats.grad_norm)


def _shown(name: str, value: float, limit: float) -> str:
    beyond = f" above {limit:.6g}" if value > limit else ""
    return f"{name} {value:.6g}{beyond}"
