"""What stands in the folder of a save before its commit, and whether that is all of it.

    begun.json                     the manifest, but for what ranks have written; the first file
    rank-00000.safetensors         the state of rank 0
    rank-00000.safetensors.json    what that file holds, written when it is on the disk
    manifest.json                  all of it; the last file, in whose favour the others then go

So a process that knows nothing of the save can finish it.
"""

from pathlib import Path

from mamba_dist.checkpoint.faults import is_damage
from mamba_dist.checkpoint.layout import (
    checkpoint_folder,
    rank_file,
    staged_steps,
    staging_folder,
)
from mamba_dist.checkpoint.manifest import CheckpointManifest, RankRecord, read_manifest
from mamba_dist.errors import (
    CheckpointError,
    DamagedCheckpointError,
    OtherVersionError,
    UnreadableCheckpointError,
)

BEGUN_MANIFEST = "begun.json"


def rank_record_path(staging: Path, rank: int) -> Path:
    """Where a rank says what it has written."""
    return staging / f"{rank_file(rank)}.json"


def written_steps(run_dir: Path) -> list[int]:
    """Steps of the saves, ascending, that lack nothing but the commit; contents are not read.

    Raises:
        OtherVersionError: another version made one of them.
        UnreadableCheckpointError: one cannot be read now.
    """
    return [
        step
        for step in staged_steps(run_dir)
        if not checkpoint_folder(run_dir, step).exists()
        and _is_written(staging_folder(run_dir, step), step)
    ]


def records_are_complete(staging: Path, *, ranks: int) -> bool:
    """Whether all ranks have written, as far as can be seen from here."""
    try:
        _take_records(staging, ranks=ranks)
    except CheckpointError:
        return False
    return True


def manifest_of_cut_commit(staging: Path) -> CheckpointManifest | None:
    """The manifest, if a commit was cut off after it had stood on the disk.

    Raises:
        OtherVersionError, UnreadableCheckpointError: as of `read_manifest`.
    """
    try:
        return read_manifest(staging)
    except (OtherVersionError, UnreadableCheckpointError):
        raise
    except CheckpointError:
        return None


def collected_manifest(staging: Path) -> CheckpointManifest:
    """The manifest of what all ranks have written.

    Raises:
        CheckpointError: a part is not there, or not whole.
        OtherVersionError, UnreadableCheckpointError: as of `read_manifest`.
    """
    begun = read_manifest(staging, name=BEGUN_MANIFEST)
    records = _take_records(staging, ranks=begun.world_size)
    return begun.model_copy(
        update={
            "shapes": {name: shape for r in records for name, shape in r.shapes.items()},
            "files": [record.file for record in records],
            "fragments": [fragment for record in records for fragment in record.fragments],
        }
    )


def remove_records(staging: Path, *, ranks: int) -> None:
    """Removes all but the ranks' files and the manifest, which says the same."""
    for rank in range(ranks):
        rank_record_path(staging, rank).unlink(missing_ok=True)
    (staging / BEGUN_MANIFEST).unlink(missing_ok=True)


def _is_written(staging: Path, step: int) -> bool:
    try:
        manifest = manifest_of_cut_commit(staging) or collected_manifest(staging)
        whole = all(
            (staging / file.name).stat().st_size == file.size_bytes for file in manifest.files
        )
    except (OtherVersionError, UnreadableCheckpointError):
        # Of this nobody may say that it is not written, and remove it.
        raise
    except CheckpointError:
        return False
    except OSError as error:
        if is_damage(error):
            return False
        raise UnreadableCheckpointError.of(staging, error) from error
    return whole and manifest.progress.step == step


def _take_records(staging: Path, *, ranks: int) -> list[RankRecord]:
    found = []
    for path in (rank_record_path(staging, rank) for rank in range(ranks)):
        try:
            found.append(RankRecord.model_validate_json(path.read_bytes()))
        except OSError as error:
            if is_damage(error):
                raise CheckpointError(f"{path}: is not there ({error.strerror})") from error
            raise UnreadableCheckpointError.of(path, error) from error
        except ValueError as error:
            raise DamagedCheckpointError(f"{path}: is not whole ({error})") from error
    return found
