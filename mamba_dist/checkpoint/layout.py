"""Names of a run folder's checkpoints, and which of them are committed.

checkpoints/step-00001000/             committed: the rename onto this name is the commit
    manifest.json
    rank-00000.safetensors             the fragments of rank 0
checkpoints/step-00002000.partial/     being written, or left behind by a kill: a start commits it
                                       if all is in it (see staged.py), else removes it
checkpoints/step-00003000.removed/     being deleted, or left behind by a kill
checkpoints/step-00004000.damaged/     found damaged at a resume, kept for a person
checkpoints/step-00005000.abandoned/   written in a row of skipped steps that a rollback took back
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
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
    delete(staging, missing_ok=True)
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


@dataclass(frozen=True)
class Removal:
    """Names of what was removed, and of what could not be."""

    removed: list[str]
    failures: dict[str, OSError]


def remove_left_behind(run_dir: Path, *, deletions_only: bool = False) -> Removal:
    """Removes the unfinished writes and deletions of an earlier process, as far as it can."""
    folder = checkpoints_folder(run_dir)
    done = Removal([], {})
    if not folder.is_dir():
        return done
    left = sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir()
        and (match := _LEFT_BEHIND.fullmatch(entry.name))
        and not (deletions_only and match[1] != "removed")
    )
    for entry in left:
        try:
            delete(entry)
            done.removed.append(entry.name)
        except OSError as error:
            done.failures[entry.name] = error
    return done


def remove_checkpoint(run_dir: Path, step: int) -> None:
    """Deletes a committed checkpoint; a kill in between leaves no half of it under its name."""
    folder = checkpoint_folder(run_dir, step)
    doomed = folder.with_suffix(".removed")
    delete(doomed, missing_ok=True)
    os.rename(folder, doomed)
    # Else a power cut might bring the old name back over files that are gone.
    sync_folder(folder.parent)
    delete(doomed)


def delete(folder: Path, *, missing_ok: bool = False) -> None:
    """Deletes a folder; of one that lies elsewhere, the link to it."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists() or not missing_ok:
        shutil.rmtree(folder)


def set_aside(run_dir: Path, step: int, *, suffix: str = ".damaged") -> str:
    """New name of a checkpoint, under which nothing reads it; it is kept for a person."""
    folder = checkpoint_folder(run_dir, step)
    kept = folder.with_suffix(suffix)
    delete(kept, missing_ok=True)
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
