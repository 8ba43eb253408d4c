"""Where a run stands, and its return to that point: progress, lock and resume.

No random state is kept: the data order derives from (seed, step), and Mamba has no dropout.
"""

import fcntl
import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_dist.checkpoint.layout import committed_steps, remove_left_behind
from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.checkpoint.store import (
    CheckpointReader,
    find_checkpoint,
    require_same_model,
    set_aside_newer,
)
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import RunOrder, Segment, mixture_fingerprint
from mamba_dist.engine.base import Engine
from mamba_dist.engine.world import World
from mamba_dist.errors import CheckpointError, DataError, TrainingError
from mamba_dist.train.continuation import continued_order

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """Where a run goes on, `reader` being the checkpoint to load, None at its very beginning."""

    progress: Progress
    order: RunOrder
    reader: CheckpointReader | None

    def load(self, engine: Engine) -> None:
        """Brings the engine to the state of the checkpoint.

        Raises:
            CheckpointError: the checkpoint does not fit the engine.
        """
        if self.reader is not None:
            engine.load_fragments(self.reader, adam_steps=self.reader.manifest.adam_steps)
            _log.info("resumed after step %d from %s", self.reader.step, self.reader.folder)


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


def starting_point(config: RunConfig, *, world: World, fresh: RunOrder) -> StartingPoint:
    """Where to go on; `fresh` is the order that the config would begin with.

    Raises:
        DataError: ranks found different data sets, such as copies on their nodes that differ.
        CheckpointError: the checkpoints are damaged, belong to another model, to other data or
            another batch size (and the config accepts no such change), or the config's
            checkpoint.resume contradicts what the run folder holds.
    """
    run_dir = run_folder(config)
    _require_same_data_everywhere(fresh, world)
    start = StartingPoint(beginning(fresh), fresh, None)
    if config.checkpoint.resume == "never":
        if world.any_rank(bool(committed_steps(run_dir))):
            raise CheckpointError(
                f"{run_dir}: holds checkpoints, but checkpoint.resume is never; "
                "set it to auto, or train in another run folder (training.run_dir=…)"
            )
        return start
    reader = find_checkpoint(run_dir, ranks=world, notice=_log.warning)
    if reader is None:
        if config.checkpoint.resume == "required":
            raise CheckpointError(
                f"{run_dir}: no checkpoint to resume, but checkpoint.resume is required; "
                "check training.run_dir, or set checkpoint.resume=auto to start afresh"
            )
        return start
    require_same_model(reader, config.model)
    order = continued_order(reader, config, fresh)
    if world.rank == 0:
        for name in set_aside_newer(run_dir, reader.step):
            _log.warning("damaged checkpoint set aside as %s", name)
    world.barrier()
    for line in _changes(reader.config, config):
        _log.warning("changed since step %d: %s", reader.step, line)
    return StartingPoint(saved_progress(reader, order), order, reader)


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


def _require_same_data_everywhere(fresh: RunOrder, world: World) -> None:
    sources = fresh.segments[0].sources
    found = [[source.fingerprint, source.samples] for source in sources]
    # As far as a float64 sum over ranks is exact.
    digest = int.from_bytes(hashlib.blake2b(repr(found).encode(), digest_size=4).digest(), "big")
    if world.any_rank(world.sum_over_ranks([digest])[0] != digest * world.size):
        error = DataError(
            f"the ranks read different data: rank {world.rank} found "
            + ", ".join(f"{s.path} (fingerprint {s.fingerprint[:12]})" for s in sources)
            + "; give every node the same data sets"
        )
        error.of_one_rank = True
        raise error


def prepare_run_folder(config: RunConfig, *, world: World) -> AbstractContextManager[object]:
    """Holds the run folder, made and cleaned of what a kill left, for this run alone.

    The kernel releases the lock when the process ends, however it ends.

    Raises:
        TrainingError: on all ranks, if another run holds the folder or it cannot be written.
    """
    run_dir = run_folder(config)
    lock: AbstractContextManager[object] = nullcontext()
    problem = ""
    if world.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = (run_dir / "lock").open("w", encoding="utf-8")
            lock = file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in remove_left_behind(run_dir):
                _log.warning("removed %s, which an interrupted save left behind", name)
        except BlockingIOError:
            problem = "another run is training in it; wait for its end, or set training.run_dir=…"
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); set training.run_dir=…"
    if world.any_rank(bool(problem)):
        raise TrainingError(f"{run_dir}: {problem or 'refused by rank 0'}")
    return lock


def run_folder(config: RunConfig) -> Path:
    """The folder of the run; set by loading a config file."""
    if config.training.run_dir is None:
        raise ValueError("training.run_dir is filled in when a config is loaded from a file")
    return Path(config.training.run_dir)


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
