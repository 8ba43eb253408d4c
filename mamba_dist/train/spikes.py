"""Which steps are outliers: a loss or gradient norm far above those of the last applied steps.

The limit is mean + sigmas * standard deviation over a window, as in the skip-step optimizer of
OLMo-core (github.com/allenai/OLMo-core). Dropped steps stay out of the window, so that a row of bad
ones cannot make itself normal. The window stands in Progress: a resumed run judges alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mamba_dist.checkpoint.manifest import Progress


@dataclass(frozen=True)
class Limits:
    """What a step may reach; beyond is a spike. inf where nothing is judged."""

    loss: float = math.inf
    """Nats per token."""
    grad_norm: float = math.inf


@dataclass(frozen=True)
class SpikeRule:
    """So many standard deviations above the mean of so many steps; `sigmas` None judges nothing."""

    sigmas: float | None
    window_steps: int

    def limits(self, progress: Progress) -> Limits:
        """Those of the next step; none before half a window of applied steps."""
        if self.sigmas is None or len(progress.recent_losses) < max(2, self.window_steps // 2):
            return Limits()
        return Limits(
            loss=_limit(progress.recent_losses, self.sigmas),
            grad_norm=_limit(progress.recent_grad_norms, self.sigmas),
        )

    def after(self, progress: Progress, *, loss: float, grad_norm: float) -> Progress:
        """With one more applied step in the window; `loss` in nats per token."""
        if self.sigmas is None:
            return progress
        keep = slice(-self.window_steps, None)
        return progress.model_copy(
            update={
                "recent_losses": (*progress.recent_losses, loss)[keep],
                "recent_grad_norms": (*progress.recent_grad_norms, grad_norm)[keep],
            }
        )


def _limit(values: Sequence[float], sigmas: float) -> float:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean + sigmas * math.sqrt(variance)
