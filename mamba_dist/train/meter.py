"""What the loop measures between two log records."""

import time
from collections.abc import Callable, Iterator

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.data.batch import Batch
from mamba_dist.engine.base import StepStats
from mamba_dist.errors import DataError
from mamba_dist.telemetry.metrics import Metrics, TrainRecord
from mamba_dist.telemetry.timers import Stopwatch, peak_memory_gib
from mamba_dist.train.lag import LoaderLag


class Meter:
    """Sums over the steps since the last record, without the time of validation and saves.

    `step_positions` are those of all sequences of a step, over all ranks.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        log_steps: int,
        world_size: int,
        step_positions: int,
        flops_per_token: float,
        advance_to: Callable[[int], None],
        loader_workers: int,
    ) -> None:
        self._metrics = metrics
        self._log_steps = log_steps
        self._world_size = world_size
        self._step_positions = step_positions
        self._flops_per_token = flops_per_token
        self._advance_to = advance_to
        self._data_wait = Stopwatch()
        self._lag = LoaderLag(workers=loader_workers)
        self._step_started_at = time.perf_counter()
        self._clear()

    def next_batches(self, steps: Iterator[list[Batch]]) -> tuple[list[Batch], DataError | None]:
        """The loader's next optimizer step, or why there is none; the wait for it is measured."""
        self._step_started_at = time.perf_counter()
        with self._data_wait.running():
            try:
                return next(steps), None
            except DataError as error:
                return [], error

    def restart(self, progress: Progress) -> None:
        """Forgets the steps since the last record: the run goes on from `progress`."""
        self._clear()
        self._data_wait.reset()
        self._advance_to(progress.step)

    def observe(
        self, progress: Progress, *, loss_sum: float, tokens: int, lr: float, stats: StepStats
    ) -> None:
        """Takes note of a finished step, and writes a record when one is due."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += time.perf_counter() - self._step_started_at
        self._skipped += stats.skipped
        if not stats.skipped:
            # A skipped step's loss may be NaN, and it taught nothing.
            self._loss_sum += loss_sum
            self._loss_tokens += tokens
        self._advance_to(progress.step)
        if progress.step % self._log_steps == 0:
            self.flush(progress, lr=lr, grad_norm=stats.grad_norm)

    def flush(self, progress: Progress, *, lr: float, grad_norm: float) -> None:
        """Writes a record of the steps since the last one, if there are any."""
        if not self._steps:
            return
        tokens_per_s = self._tokens / self._seconds
        step_s, wait_s = self._seconds / self._steps, self._data_wait.reset() / self._steps
        self._lag.observe(progress.step, wait_s=wait_s, step_s=step_s)
        self._metrics.write(
            TrainRecord(
                step=progress.step,
                loss=self._loss_sum / self._loss_tokens if self._loss_tokens else float("nan"),
                learning_rate=lr,
                grad_norm=grad_norm,
                skipped_steps=self._skipped,
                tokens=progress.trained_tokens,
                unlabelled_share=1 - self._tokens / (self._steps * self._step_positions),
                tokens_per_s=tokens_per_s,
                tokens_per_s_per_device=tokens_per_s / self._world_size,
                model_tflops_per_s=tokens_per_s * self._flops_per_token / 1e12,
                step_s=step_s,
                data_wait_s=wait_s,
                peak_memory_gib=peak_memory_gib(),
            )
        )
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._skipped = 0
        self._tokens = 0
        self._loss_tokens = 0
        self._loss_sum = 0.0
        self._seconds = 0.0
