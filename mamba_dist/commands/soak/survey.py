"""What stands in a run folder, every byte of its checkpoints verified by the package itself."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mamba_dist.checkpoint.layout import (
    checkpoint_folder,
    checkpoints_folder,
    committed_steps,
    unfinished,
)
from mamba_dist.checkpoint.manifest import manifest_text, read_manifest
from mamba_dist.checkpoint.staged import written_steps
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.errors import CheckpointError


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a run, by step: the manifests of the whole ones, the fault of others."""

    whole: Mapping[int, str]
    damaged: Mapping[int, str]
    left_behind: tuple[str, ...]
    """Names of unfinished writes and deletions."""
    written: tuple[int, ...] = ()
    """Steps of those of them that a start commits, since ranks had written all of it."""

    @property
    def newest(self) -> int:
        """The step of the newest that a start can go on from, 0 without any."""
        return max((self.committed, *self.written))

    @property
    def committed(self) -> int:
        """The step of the newest whole one, 0 without any."""
        return max(self.whole, default=0)


def survey(run_dir: Path) -> Survey:
    """What stands there, while no run is at work."""
    whole, damaged = {}, {}
    for step in committed_steps(run_dir):
        folder = checkpoint_folder(run_dir, step)
        try:
            manifest = read_manifest(folder)
            fault = next((str(one) for one in checkpoint_damage(folder, manifest)), None)
        except CheckpointError as error:
            fault = str(error)
        if fault is None:
            whole[step] = manifest_text(manifest)
        else:
            damaged[step] = fault
    folder = checkpoints_folder(run_dir)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    left = tuple(one.name for one in entries if unfinished(one))
    return Survey(whole, damaged, left, tuple(written_steps(run_dir)))


def clear_for_a_person(run_dir: Path) -> None:
    """Takes away what runs keep for a person to look at, as that person does."""
    for folder in [*checkpoints_folder(run_dir).glob("*.damaged"), run_dir / "hangs"]:
        shutil.rmtree(folder, ignore_errors=True)
