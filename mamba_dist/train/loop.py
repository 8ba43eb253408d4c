"""The training loop."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.checkpoint.store import Snapshot
from mamba_dist.data.batch import Batch
from mamba_dist.errors import DivergedError
from mamba_dist.ops.readback import read_later
from mamba_dist.train.build import Run
from mamba_dist.train.evaluate import evaluate, label_count, model_inputs
from mamba_dist.train.rollback import Rollbacks
from mamba_dist.train.run_folder import HeldFolder
from mamba_dist.train.schedule import learning_rate
from mamba_dist.train.state import advanced

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: at its last step, or earlier because it was told to stop."""

    progress: Progress
    stopped_by: str | None


def train(run: Run, folder: HeldFolder) -> Outcome:
    """Trains until the last step, or until some rank is told to stop.

    Raises:
        DivergedError: too many steps in a row were skipped, whatever samples were passed over, or
            the final loss is not finite.
        TrainingError: another run has taken the folder.
        DataError: the loader failed.
        CheckpointError: the last checkpoint of this start could not be written, or a rollback
            found none that is whole.
    """
    config, world, meter, guard = run.config, run.world, run.meter, run.guard
    progress, rollbacks = run.start, Rollbacks(run)
    while progress.step < run.total_steps:
        lr = learning_rate(config.training, step=progress.step, total_steps=run.total_steps)
        samples = run.steps.order.positions(progress.step)
        batches, fault = meter.next_batches(run.steps)
        # The loss is a sum over labels divided once by their number in the whole step, so that
        # neither padding, accumulation nor the number of ranks changes the weight of a token.
        labels = sum(label_count(batch) for batch in batches)
        tokens = world.sum_tokens_or_raise(labels, fault)
        own_loss = _accumulate(run, batches, step_tokens=max(tokens, 1))
        skip_above = guard.skip_above(progress, own_loss, tokens)
        run.saver.hold_update()
        stats = run.engine.step(
            lr,
            max_grad_norm=config.training.max_grad_norm,
            skip_above=skip_above,
        )
        # One reduction carries the loss and the agreement to stop: all ranks save the same step.
        loss_sum, stops, votes = world.sum_over_ranks(
            [own_loss(), float(run.stop.reason is not None), run.saver.vote]
        )
        loss = loss_sum / max(tokens, 1)
        progress = advanced(progress, samples=samples, tokens=0 if stats.skipped else tokens)
        progress = guard.noted(progress, loss=loss, stats=stats)
        meter.observe(progress, loss_sum=loss_sum, tokens=tokens, lr=lr, stats=stats)
        too_many = guard.observe(progress, loss=loss, stats=stats, samples=samples)
        run.saver.hear(votes)
        run.watchdog.step_done(progress.step)
        if too_many is not None:
            with run.watchdog.paused():
                progress = rollbacks.go_back(too_many)
            continue
        in_row = guard.dropped_in_row
        run.saver.need(progress.step - in_row if in_row else None)
        last = progress.step == run.total_steps
        stopping = stops > 0 and not last
        if last or stopping:
            meter.flush(progress, lr=lr, grad_norm=stats.grad_norm)
        val_loss = None
        if last or (not stopping and _due(config.training.eval_steps, progress.step)):
            val_loss = _validate(run, progress, last=last)
        if last or stopping or _due(config.checkpoint.save_steps, progress.step):
            folder.require()
            with run.watchdog.paused():
                _save(run, progress, val_loss=val_loss, must_succeed=last or stopping)
        if stopping:
            return Outcome(progress, run.stop.reason or "a stop of another rank")
    return Outcome(progress, None)


def _accumulate(run: Run, batches: list[Batch], *, step_tokens: int) -> Callable[[], float]:
    """Leaves the gradients of a step in the engine; what comes back is this rank's sum of losses,
    read when asked for, so that the device has the update to do while the host waits."""
    losses = []
    for batch in batches:
        losses.append(
            run.engine.forward_backward(
                model_inputs(batch), step_tokens=step_tokens, last=batch is batches[-1]
            )
        )
        run.watchdog.beat()
    return read_later(sum(losses[1:], start=losses[0]))


def _due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


def _validate(run: Run, progress: Progress, *, last: bool) -> float | None:
    """The validation loss, if it is finite and no stop came between."""
    record = evaluate(
        run.engine,
        run.validation,
        world=run.world,
        stop=run.stop,
        watchdog=run.watchdog,
        step=progress.step,
    )
    if record is None:
        return None
    run.metrics.write(record)
    if math.isfinite(record.val_loss):
        return record.val_loss
    if last:
        raise DivergedError(
            f"the run ends at step {progress.step} with a validation loss of {record.val_loss}; "
            "its weights are broken: resume from an older checkpoint"
        )
    return None


def _save(run: Run, progress: Progress, *, val_loss: float | None, must_succeed: bool) -> None:
    snapshot = Snapshot(
        progress=progress,
        adam_steps=run.engine.adam_steps,
        fragments=run.engine.fragments(),
        config=run.config,
        tokenizer=run.tokenizer,
        engine=run.engine_name,
        versions=run.versions,
        saved_at=round(time.time(), 3),
        val_loss=val_loss,
    )
    run.saver.save(snapshot, must_succeed=must_succeed)
