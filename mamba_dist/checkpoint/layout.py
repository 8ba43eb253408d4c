"""Names of a run folder's checkpoints, and which of them are committed.

checkpoints/step-00001000/             committed: the rename onto this name is the commit
    manifest.json
    rank-00000.safetensors             the fragments of rank 0
checkpoints/step-00002000.partial/     being written, or left behind by a kill: a start commits it
                                       if all is in it, and else removes it
    begun.json                         the manifest, but for what ranks have written
    rank-00000.safetensors.json        what rank 0 has written
checkpoints/step-00003000.removed/     being deleted, or left behind by a kill
checkpoints/step-00004000.damaged/     found damaged at a resume, kept for a person
checkpoints/step-00005000.abandoned/   written in a row of skipped steps that a rollback took back
"""

import os
import re
import shutil
from pathlib import Path

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
BEGUN_MANIFEST = "begun.json"
_COMMITTED = re.compile(r"step-(\d{8,})")
_STAGED = re.compile(r"step-(\d{8,})\.partial")
_LEFT_BEHIND = re.compile(r"step-\d{8,}\.(partial|removed)")


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / CHECKPOINTS


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """The committed name of the checkpoint after `step` optimizer steps."""
    return checkpoints_folder(run_dir) / f"step-{step:08d}"


def staging_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before its commit."""
    return checkpoint_folder(run_dir, step).with_suffix(".partial")


def make_staging_folder(run_dir: Path, step: int) -> Path:
    """The empty staging folder of a step; what an earlier attempt left in it is gone."""
    parent, staging = checkpoints_folder(run_dir), staging_folder(run_dir, step)
    if not parent.is_dir():
        parent.mkdir(parents=True)
        # Its name too must survive a power cut, or the first checkpoint is lost with it.
        sync_folder(run_dir)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    return staging


def rank_file(rank: int) -> str:
    """Name of the file with one rank's fragments."""
    return f"rank-{rank:05d}.safetensors"


def committed_steps(run_dir: Path) -> list[int]:
    """Steps of all committed checkpoints of a run, ascending."""
    return _steps_named(_COMMITTED, run_dir)


def staged_steps(run_dir: Path) -> list[int]:
    """Steps of all saves of a run that were begun and not committed, ascending."""
    return _steps_named(_STAGED, run_dir)


def unfinished(folder: Path) -> bool:
    """Whether `folder` is an unfinished write or deletion, by its name."""
    return bool(_LEFT_BEHIND.fullmatch(folder.resolve().name))


def remove_left_behind(run_dir: Path, *, deletions_only: bool = False) -> list[str]:
    """Names of the unfinished writes and deletions of an earlier process, which are now gone."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    left = sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir()
        and (match := _LEFT_BEHIND.fullmatch(entry.name))
        and not (deletions_only and match[1] != "removed")
    )
    for entry in left:
        shutil.rmtree(entry)
    return [entry.name for entry in left]


def remove_checkpoint(run_dir: Path, step: int) -> None:
    """Deletes a committed checkpoint; a kill in between leaves no half of it under its name."""
    folder = checkpoint_folder(run_dir, step)
    doomed = folder.with_suffix(".removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    # Else a power cut might bring the old name back over files that are gone.
    sync_folder(folder.parent)
    shutil.rmtree(doomed)


def set_aside(run_dir: Path, step: int, *, suffix: str = ".damaged") -> str:
    """New name of a checkpoint, under which nothing reads it; it is kept for a person."""
    folder = checkpoint_folder(run_dir, step)
    kept = folder.with_suffix(suffix)
    if kept.exists():
        shutil.rmtree(kept)
    os.rename(folder, kept)
    return kept.name


def _steps_named(form: re.Pattern[str], run_dir: Path) -> list[int]:
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    matches = [form.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
