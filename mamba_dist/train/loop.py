"""The training loop."""

import logging
import math
import time
from dataclasses import dataclass

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.checkpoint.store import Snapshot
from mamba_dist.errors import TrainingError
from mamba_dist.ops.readback import read_later
from mamba_dist.train.build import Run
from mamba_dist.train.evaluate import evaluate, label_count, model_inputs
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
        TrainingError: too many steps in a row were skipped, the final loss is not finite, or
            another run has taken the folder.
        DataError: the loader failed.
        CheckpointError: the last checkpoint of this start could not be written.
    """
    config, world, engine, meter = run.config, run.world, run.engine, run.meter
    progress = run.start
    while progress.step < run.total_steps:
        lr = learning_rate(config.training, step=progress.step, total_steps=run.total_steps)
        batches, fault = meter.next_batches(run.steps)
        # The loss is a sum over labels divided once by their number in the whole step, so that
        # neither padding, accumulation nor the number of ranks changes the weight of a token.
        labels = sum(label_count(batch) for batch in batches)
        tokens = world.sum_tokens_or_raise(labels, fault)
        losses = [
            engine.forward_backward(
                model_inputs(batch), step_tokens=max(tokens, 1), last=batch is batches[-1]
            )
            for batch in batches
        ]
        # Read after the step, so that the device has the update to do while the host waits.
        own_loss = read_later(sum(losses[1:], start=losses[0]))
        run.saver.hold_update()
        stats = engine.step(
            lr,
            max_grad_norm=config.training.max_grad_norm,
            skip_above=config.training.skip_grad_norm_above,
        )
        # One reduction carries the loss and the agreement to stop: all ranks save the same step.
        loss, stops, votes = world.sum_over_ranks(
            [own_loss(), float(run.stop.reason is not None), run.saver.vote]
        )
        first_sample = progress.next_sample
        progress = advanced(progress, tokens=0 if stats.skipped else tokens)
        meter.observe(progress, loss_sum=loss, tokens=tokens, lr=lr, stats=stats)
        run.guard.observe(
            step=progress.step,
            skipped=stats.skipped,
            grad_norm=stats.grad_norm,
            samples=range(first_sample, progress.next_sample),
        )
        run.saver.hear(votes)
        last = progress.step == run.total_steps
        stopping = stops > 0 and not last
        if last or stopping:
            meter.flush(progress, lr=lr, grad_norm=stats.grad_norm)
        val_loss = None
        if last or (not stopping and _due(config.training.eval_steps, progress.step)):
            val_loss = _validate(run, progress, last=last)
        if last or stopping or _due(config.checkpoint.save_steps, progress.step):
            folder.require()
            _save(run, progress, val_loss=val_loss, must_succeed=last or stopping)
        if stopping:
            return Outcome(progress, run.stop.reason or "a stop of another rank")
    return Outcome(progress, None)


def _due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


def _validate(run: Run, progress: Progress, *, last: bool) -> float | None:
    """The validation loss, if it is finite and no stop came between."""
    record = evaluate(
        run.engine, run.validation, world=run.world, stop=run.stop, step=progress.step
    )
    if record is None:
        return None
    run.metrics.write(record)
    if math.isfinite(record.val_loss):
        return record.val_loss
    if last:
        raise TrainingError(
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
