"""Saves a checkpoint: staged by all ranks, hashed, forced to the disk, committed by one rename.

Every rank writes its state (`write_rank`), and rank 0 commits what all have written. Here training
waits for it; `background` does the same beside it, from a copy.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mamba_dist.checkpoint.layout import (
    MANIFEST,
    checkpoint_folder,
    make_staging_folder,
    staging_folder,
    sync_folder,
)
from mamba_dist.checkpoint.manifest import (
    CheckpointManifest,
    Progress,
    TokenizerRecord,
    manifest_text,
)
from mamba_dist.checkpoint.rank_file import (
    remove_rank_records,
    take_rank_records,
    write_rank,
    write_synced,
)
from mamba_dist.checkpoint.ranks import Ranks
from mamba_dist.checkpoint.verification import file_damage
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.base import Fragment
from mamba_dist.errors import CheckpointError, DamagedCheckpointError


@dataclass(frozen=True)
class Snapshot:
    """The state to write: where the run is, and this rank's fragments."""

    progress: Progress
    adam_steps: int
    fragments: Iterable[Fragment]
    config: RunConfig
    tokenizer: TokenizerRecord
    engine: str
    versions: dict[str, str]
    saved_at: float | None = None
    """Seconds since 1970."""
    val_loss: float | None = None
    """Validation loss of this very state, nats per token; None: it was not validated."""


def save_checkpoint(run_dir: Path, snapshot: Snapshot, *, ranks: Ranks) -> Path:
    """The committed folder; called by all ranks, returns on all of them after the commit.

    The state is written from where it is, block by block: no memory is needed for a copy.

    Raises:
        CheckpointError: on every rank, if any rank could not write; the checkpoints before are
            untouched then.
    """
    step = snapshot.progress.step
    folder, staging = checkpoint_folder(run_dir, step), staging_folder(run_dir, step)
    prepare_staging(run_dir, step, ranks=ranks)
    with _agreed(ranks, staging):
        write_rank(staging, ranks.rank, snapshot.fragments)
    with _agreed(ranks, staging):
        if ranks.rank == 0:
            commit(staging, folder, snapshot, world_size=ranks.size)
    return folder


def prepare_staging(run_dir: Path, step: int, *, ranks: Ranks) -> None:
    """Makes the empty folder that all ranks write into; called by all of them.

    Raises:
        CheckpointError: on every rank, if it could not be made.
    """
    with _agreed(ranks, staging_folder(run_dir, step)):
        if ranks.rank == 0:
            make_staging_folder(run_dir, step)


def commit(staging: Path, folder: Path, snapshot: Snapshot, *, world_size: int) -> None:
    """Makes what all ranks have written into `staging` the checkpoint `folder`.

    Raises:
        OSError: it could not be written, or not be made durable.
        DamagedCheckpointError: a file is not there any more.
    """
    records = take_rank_records(staging, ranks=world_size)
    shapes: dict[str, list[int]] = {}
    for record in records:
        shapes.update(record.shapes)
    manifest = CheckpointManifest(
        progress=snapshot.progress,
        adam_steps=snapshot.adam_steps,
        world_size=world_size,
        engine=snapshot.engine,
        versions=snapshot.versions,
        saved_at=snapshot.saved_at,
        val_loss=snapshot.val_loss,
        config=snapshot.config,
        tokenizer=snapshot.tokenizer,
        shapes=shapes,
        files=[record.file for record in records],
        fragments=[fragment for record in records for fragment in record.fragments],
    )
    write_synced(staging / MANIFEST, manifest_text(manifest))
    remove_rank_records(staging, ranks=world_size)
    damage = next(file_damage(staging, manifest.files), None)
    if damage is not None:
        raise DamagedCheckpointError(f"{damage}: something else changes this folder")
    sync_folder(staging)
    os.rename(staging, folder)
    sync_folder(folder.parent)


def not_written(staging: Path, failure: BaseException | None) -> CheckpointError:
    """What a rank says of a save that failed by its own `failure` or, if None, by another's."""
    reason = failure or "another rank could not write"
    refusal = CheckpointError(
        f"{staging}: checkpoint not written ({reason}); the ones before are untouched"
    )
    refusal.of_one_rank = failure is not None
    return refusal


@contextmanager
def _agreed(ranks: Ranks, staging: Path) -> Iterator[None]:
    """Runs a stage of a save; if it fails on any rank, all raise and none waits for ever."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        # Whatever it was: a rank that left here alone would leave the others in the collective.
        failure = error
    if ranks.any_rank(failure is not None):
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise not_written(staging, failure) from failure
