"""Validation loss: nats per token over the validation sequences, the same on every rank."""

import time
from collections.abc import Iterable

from torch import Tensor

from mamba_dist.data.batch import IGNORED_LABEL, Batch
from mamba_dist.engine.base import Engine
from mamba_dist.engine.world import World
from mamba_dist.telemetry.metrics import ValidationRecord
from mamba_dist.train.stop import StopRequest
from mamba_dist.train.watchdog import Watchdog


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model takes of a batch; it returns the loss summed over the labels."""
    return {"input_ids": batch.input_ids, "labels": batch.labels, "seq_idx": batch.seq_idx}


def label_count(batch: Batch) -> int:
    """Positions of a batch at which something is to be predicted."""
    return int((batch.labels != IGNORED_LABEL).sum())


def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    step: int,
) -> ValidationRecord | None:
    """The loss after `step` optimizer steps; every rank must pass equally many batches.

    None if some rank was told to stop meanwhile: a launcher that waits for the end kills soon.
    """
    started_at = time.perf_counter()
    loss_sum = 0.0
    tokens = 0
    for batch in batches:
        if world.any_rank(stop.reason is not None):
            return None
        # What the first one compiles may take longer than anything later.
        with watchdog.first_time_paused("validation"):
            loss_sum += float(engine.evaluate(model_inputs(batch)))
        tokens += label_count(batch)
    total_loss, total_tokens = world.sum_over_ranks([loss_sum, tokens])
    return ValidationRecord(
        step=step,
        val_loss=total_loss / max(total_tokens, 1),
        val_tokens=int(total_tokens),
        seconds=time.perf_counter() - started_at,
    )
