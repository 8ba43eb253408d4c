"""Saves a checkpoint: staged by all ranks, hashed, forced to the disk, committed by one rename.

Every rank writes its state (`write_rank`), and rank 0 commits what all have written. Here training
waits for it; `background` does the same beside it, from a copy. All that the commit needs stands in
the staging folder, so that a start can finish the save of a process that was killed.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
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
from mamba_dist.checkpoint.rank_file import write_rank, write_synced
from mamba_dist.checkpoint.ranks import Ranks
from mamba_dist.checkpoint.staged import (
    BEGUN_MANIFEST,
    collected_manifest,
    manifest_of_cut_commit,
    remove_records,
    written_steps,
)
from mamba_dist.checkpoint.verification import file_damage
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.base import Fragment
from mamba_dist.errors import CheckpointError, DamagedCheckpointError, UnwrittenCheckpointError


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


def save_checkpoint(
    run_dir: Path,
    snapshot: Snapshot,
    *,
    ranks: Ranks,
    wrote: Callable[[], None] = lambda: None,
) -> Path:
    """The committed folder; called by all ranks, returns on all of them after the commit.

    The state is written from where it is, block by block: no memory is needed for a copy.

    Args:
        wrote: see `write_rank`.

    Raises:
        CheckpointError: on every rank, if any rank could not write; the checkpoints before are
            untouched then.
    """
    step = snapshot.progress.step
    folder, staging = checkpoint_folder(run_dir, step), staging_folder(run_dir, step)
    prepare_staging(run_dir, snapshot, ranks=ranks)
    with _agreed(ranks, staging):
        write_rank(staging, ranks.rank, snapshot.fragments, wrote=wrote)
    with _agreed(ranks, staging):
        if ranks.rank == 0:
            commit(staging, folder)
    return folder


def prepare_staging(run_dir: Path, snapshot: Snapshot, *, ranks: Ranks) -> None:
    """Makes the folder that all ranks write into, with what is known before; called by all of them.

    Raises:
        CheckpointError: on every rank, if it could not be made.
    """
    step = snapshot.progress.step
    with _agreed(ranks, staging_folder(run_dir, step)):
        if ranks.rank == 0:
            begun = manifest_text(_begun(snapshot, world_size=ranks.size))
            write_synced(make_staging_folder(run_dir, step) / BEGUN_MANIFEST, begun)


def commit(staging: Path, folder: Path) -> None:
    """Makes what all ranks have written into `staging` the checkpoint `folder`.

    Raises:
        CheckpointError: a rank has not written its part, or a file changed since.
        OSError: it could not be written, or not be made durable.
    """
    manifest = manifest_of_cut_commit(staging)
    if manifest is None:
        manifest = collected_manifest(staging)
        write_synced(staging / MANIFEST, manifest_text(manifest))
    damage = next(file_damage(staging, manifest.files), None)
    if damage is not None:
        raise DamagedCheckpointError(f"{damage}: something else changes this folder")
    # Only once the manifest is on the disk is what it was made of not needed any more.
    remove_records(staging, ranks=manifest.world_size)
    sync_folder(staging)
    os.rename(staging, folder)
    sync_folder(folder.parent)


def finish_saves(run_dir: Path) -> Iterator[Path]:
    """The checkpoints that ended processes had written whole, each of them committed now.

    Called while nothing else writes there; what they had written in part is left as it is.

    Raises:
        CheckpointError: another version made one, one cannot be read now, or not be committed.
    """
    for step in written_steps(run_dir):
        staging, folder = staging_folder(run_dir, step), checkpoint_folder(run_dir, step)
        try:
            commit(staging, folder)
        except OSError as error:
            raise UnwrittenCheckpointError(
                f"{staging}: an interrupted save left all of it, but it cannot be committed "
                f"({error.strerror or error}); see to the disk, or delete this folder to go on "
                "from the checkpoint before"
            ) from error
        yield folder


def _begun(snapshot: Snapshot, *, world_size: int) -> CheckpointManifest:
    return CheckpointManifest(
        progress=snapshot.progress,
        adam_steps=snapshot.adam_steps,
        world_size=world_size,
        engine=snapshot.engine,
        versions=snapshot.versions,
        saved_at=snapshot.saved_at,
        val_loss=snapshot.val_loss,
        config=snapshot.config,
        tokenizer=snapshot.tokenizer,
        shapes={},
        files=[],
        fragments=[],
    )


def not_written(staging: Path, failure: BaseException | None) -> CheckpointError:
    """What a rank says of a save that failed by its own `failure` or, if None, by another's."""
    reason = failure or "another rank could not write"
    refusal = UnwrittenCheckpointError(
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
