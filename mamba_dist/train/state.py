"""Where a run stands, and its return to that point: progress and resume.

No random state is kept: the data order derives from (seed, step), and Mamba has no dropout.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.checkpoint.reader import (
    CheckpointReader,
    DamageNote,
    find_checkpoint,
    require_readable,
    require_same_model,
    set_aside_newer,
)
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import RunOrder, Segment, mixture_fingerprint
from mamba_dist.engine.base import Engine
from mamba_dist.engine.world import World
from mamba_dist.errors import CheckpointError
from mamba_dist.train.continuation import continued_order
from mamba_dist.train.run_folder import appears, run_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """Where a run goes on, `reader` being the checkpoint to load, None at its very beginning."""

    progress: Progress
    order: RunOrder
    reader: CheckpointReader | None


def beginning(order: RunOrder) -> Progress:
    """The progress of a run that has not trained yet."""
    return Progress(step=0, next_sample=0, trained_tokens=0, **_described(order))


def advanced(progress: Progress, *, samples: range, tokens: int) -> Progress:
    """The progress after one more optimizer step, which read `samples` and learnt from `tokens`."""
    return progress.model_copy(
        update={
            "step": progress.step + 1,
            "next_sample": samples.stop,
            "trained_tokens": progress.trained_tokens + tokens,
        }
    )


def starting_point(
    config: RunConfig, *, world: World, fresh: RunOrder, before: int | None = None
) -> StartingPoint:
    """Where to go on; `fresh` is the order that the config would begin with.

    Of the checkpoints only manifests, sizes and headers are looked at, so that a mistake is told
    before anything large is built; `load` verifies the rest. `before`: that step and later ones
    are known to be damaged.

    Raises:
        CheckpointError: the checkpoints are damaged, belong to another model, to other data or
            another batch size (and the config accepts no such change), the config's
            checkpoint.resume contradicts what the run folder holds, or ranks see different ones.
    """
    run_dir = run_folder(config)
    _require_same_checkpoints_everywhere(run_dir, world)
    start = StartingPoint(beginning(fresh), fresh, None)
    if config.checkpoint.resume == "never":
        if world.any_rank(bool(committed_steps(run_dir))):
            raise CheckpointError(
                f"{run_dir}: holds checkpoints, but checkpoint.resume is never; "
                "set it to auto, or train in another run folder (training.run_dir=…)"
            )
        return start
    reader = find_checkpoint(
        run_dir, ranks=world, notice=_log.warning, before=before, contents=False
    )
    if reader is None:
        if config.checkpoint.resume == "required":
            raise CheckpointError(
                f"{run_dir}: no checkpoint to resume, but checkpoint.resume is required; "
                "check training.run_dir, or set checkpoint.resume=auto to start afresh"
            )
        return start
    require_same_model(reader, config.model)
    order = continued_order(reader, config, fresh)
    return StartingPoint(saved_progress(reader, order), order, reader)


def load(
    start: StartingPoint, engine: Engine, config: RunConfig, *, world: World, fresh: RunOrder
) -> StartingPoint:
    """Where the run really goes on, now that the engine is in that state: `start`, or a checkpoint
    before it if bytes of that turned out to be damaged.

    Every byte is read once, and verified while it is.

    Raises:
        CheckpointError: as of `starting_point`; or the checkpoint does not fit the engine.
    """
    while start.reader is not None:
        reader, noted = start.reader, DamageNote(start.reader)
        engine.load_fragments(noted, adam_steps=reader.manifest.adam_steps)
        require_readable(noted.damage, ranks=world)
        if not world.any_rank(noted.damage is not None):
            _settle(reader, config, world=world)
            return start
        _log.warning(
            "passing over step %d: %s",
            reader.step,
            noted.damage or "another rank found a damaged file",
        )
        start = starting_point(config, world=world, fresh=fresh, before=reader.step)
    return start


def _settle(reader: CheckpointReader, config: RunConfig, *, world: World) -> None:
    """Says what the run goes on from; later checkpoints, all of them damaged, leave its way."""
    set_aside_after(reader.step, run_folder(config), world=world, suffix=".damaged")
    for line in _changes(reader.config, config):
        _log.warning("changed since step %d: %s", reader.step, line)
    _log.info("resumed after step %d from %s", reader.step, reader.folder)


def set_aside_after(step: int, run_dir: Path, *, world: World, suffix: str) -> None:
    """Renames the checkpoints after `step`, whose steps are trained again; called by all ranks.

    Raises:
        CheckpointError: on all ranks, if one cannot be renamed.
    """
    problem = ""
    if world.rank == 0:
        try:
            for name in set_aside_newer(run_dir, step, suffix=suffix):
                _log.warning("checkpoint set aside as %s", name)
        except OSError as error:
            problem = str(error)
    if world.any_rank(bool(problem)):
        raise CheckpointError(
            f"{run_dir}: a checkpoint after step {step} cannot be set aside as {suffix} "
            f"({problem or 'rank 0 says why'}); see to the folder, or move it away"
        )


def saved_progress(reader: CheckpointReader, order: RunOrder) -> Progress:
    """The progress that a checkpoint holds, going on in `order`."""
    saved = reader.manifest.progress
    update = _described(order)
    if saved.segments and _stretch(saved.segments[-1]) != _stretch(order.segments[-1]):
        # Losses of another mixture, or norms of another batch size, would make all steps spikes.
        update |= {"recent_losses": (), "recent_grad_norms": ()}
    return saved.model_copy(update=update)


def _stretch(segment: Segment) -> tuple[int, int]:
    return segment.mixture_position, segment.global_batch_size


def _require_same_checkpoints_everywhere(run_dir: Path, world: World) -> None:
    """Else ranks would go on from different steps: with a folder of its own on each node, or one
    whose newest name, which this very start may have made, does not come to all of them."""
    wanted = world.from_first(committed_steps(run_dir))
    if world.any_rank(not appears(lambda: committed_steps(run_dir) == wanted)):
        steps = committed_steps(run_dir)
        seen = f"{len(steps)}, the newest of step {steps[-1]}" if steps else "none"
        error = CheckpointError(
            f"{run_dir}: the ranks see different checkpoints, rank {world.rank} sees {seen}; put "
            "the run folder on a file system that all nodes share, or start again if it is on one"
        )
        error.of_one_rank = True
        raise error


def _changes(saved: RunConfig, now: RunConfig) -> list[str]:
    """What the run goes on with that it did not have before."""
    lines = []
    for section in ("training", "data", "engine"):
        old, new = getattr(saved, section).model_dump(), getattr(now, section).model_dump()
        lines += [
            f"{section}.{field} was {old[field]!r}, is {new[field]!r}"
            for field in new
            if new[field] != old[field]
        ]
    return lines


def _described(order: RunOrder) -> dict[str, Any]:
    """The fields of a Progress that say what is read."""
    last = order.segments[-1]
    return {
        "global_batch_size": last.global_batch_size,
        "data_fingerprint": mixture_fingerprint(last.sources),
        "segments": order.segments,
    }
