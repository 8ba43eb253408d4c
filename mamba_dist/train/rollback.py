"""Going back to the last checkpoint before a row of dropped steps, and on without their samples.

The steps from the checkpoint to the row read the same samples again, which heals whatever broke
the weights or moments in between; the row itself reads what came after it. If training breaks again
before it has got past that place, the samples in between are suspect too, and all since the
checkpoint are passed over (as arXiv 2204.02311, section 5.1, does at once).

The learning rate and the length of the run follow the step, so they are those of a run that never
saw the samples.
"""

import logging

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.checkpoint.reader import (
    CheckpointReader,
    DamageNote,
    find_checkpoint,
    require_readable,
)
from mamba_dist.errors import DivergedError, UnreadableCheckpointError
from mamba_dist.telemetry.metrics import RollbackRecord
from mamba_dist.train.build import Run, planned_steps
from mamba_dist.train.guard import BadRow
from mamba_dist.train.run_folder import run_folder
from mamba_dist.train.state import saved_progress, set_aside_after

_log = logging.getLogger(__name__)


class Rollbacks:
    """How often a start of a run may go back, and where it has."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._done = 0
        self._failed_at = -1

    def go_back(self, row: BadRow) -> Progress:
        """Where the run goes on; engine, samples and records are set back on all ranks.

        Raises:
            DivergedError: it may not go back again, or there is no checkpoint before the row.
            CheckpointError: all checkpoints before the row are damaged, or the one to go back to
                cannot be read any more.
            ConfigError: the data sets end before the run, which has lost these samples.
        """
        run = self._run
        # What is being written may be the checkpoint to go back to, or one to set aside.
        run.saver.finish()
        again = row.steps.start <= self._failed_at
        # A checkpoint right before the row may itself hold what broke it.
        reader = self._checkpoint(row, at_most=row.steps.start - again)
        steps = range(reader.step if again else row.steps.start, row.steps.stop)
        old, order = run.steps.order, run.steps.order.without(steps)
        planned_steps(run.config, order)
        self._load(reader)
        run_dir = run_folder(run.config)
        set_aside_after(reader.step, run_dir, world=run.world, suffix=".abandoned")
        run.saver.forget(after=reader.step)
        run.steps.restart(order, reader.step)
        self._done += 1
        self._failed_at = row.steps.start
        progress = saved_progress(reader, order)
        run.meter.restart(progress)
        skipped = range(old.positions(steps[0]).start, old.positions(steps[-1]).stop)
        run.metrics.write(
            RollbackRecord(reader.step, row.steps.stop, skipped.start, skipped.stop - 1)
        )
        if run.world.rank == 0:
            _log.warning(
                "%s: rollback %d of %d to %s, passing over samples %d to %d of steps %d to %d",
                row,
                self._done,
                run.config.training.max_rollbacks,
                reader.folder,
                skipped.start,
                skipped.stop - 1,
                steps.start + 1,
                steps.stop,
            )
        return progress

    def _load(self, reader: CheckpointReader) -> None:
        """Sets the engine back, or ends on all ranks: none waits for one that could not read."""
        noted = DamageNote(reader)
        self._run.engine.load_fragments(noted, adam_steps=reader.manifest.adam_steps)
        require_readable(noted.damage, ranks=self._run.world)
        if self._run.world.any_rank(noted.damage is not None):
            raise UnreadableCheckpointError(
                f"{reader.folder}: was whole, and is not any more "
                f"({noted.damage or 'another rank found a damaged file'}); the next start looks "
                "for an older one"
            )

    def _checkpoint(self, row: BadRow, *, at_most: int) -> CheckpointReader:
        run, limit = self._run, self._run.config.training.max_rollbacks
        if self._done == limit:
            raise _diverged(row, f" after {limit} rollbacks (training.max_rollbacks)" * (limit > 0))
        reader = find_checkpoint(
            run_folder(run.config),
            ranks=run.world,
            notice=_log.warning,
            at_most=at_most,
        )
        # One before this start of the run may be of another mixture or batch size.
        if reader is None or reader.step < run.start.step:
            raise _diverged(row, " before the first checkpoint to which the run could go back")
        return reader


def _diverged(row: BadRow, why: str) -> DivergedError:
    return DivergedError(
        f"{row}{why}; resume from the last checkpoint with a lower training.learning_rate, or look "
        f"at samples {row.samples.start} to {row.samples.stop - 1} (tools/which_docs.py)"
    )
