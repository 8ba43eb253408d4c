"""Which checkpoints of a run are kept, and the deletion of the others.

A checkpoint is kept for any of four reasons: it is among the newest, at a multiple of so many
steps, so many hours after the one that was kept for this reason before, or among those with the
lowest validation loss. What the rules need to know stands in each checkpoint's own manifest, where
its hash covers it and where it stays with the checkpoint wherever that is copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba_dist.checkpoint.layout import (
    checkpoint_folder,
    checkpoints_folder,
    committed_steps,
    remove_checkpoint,
    remove_left_behind,
)
from mamba_dist.checkpoint.manifest import FileRecord, read_manifest
from mamba_dist.checkpoint.verification import file_damage
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.errors import CheckpointError, UnreadableCheckpointError

_HOUR_S = 3600


@dataclass(frozen=True)
class Kept:
    """What the rules look at of one checkpoint; None where its manifest does not say."""

    step: int
    saved_at: float | None = None
    val_loss: float | None = None


def steps_to_remove(checkpoints: Sequence[Kept], policy: CheckpointConfig) -> list[int]:
    """The steps that none of the policy's rules keeps, ascending; the newest is never one."""
    ordered = sorted(checkpoints, key=lambda one: one.step)
    kept = {one.step for one in ordered[-policy.keep_last :]}
    if policy.keep_every_steps is not None:
        kept |= {one.step for one in ordered if one.step % policy.keep_every_steps == 0}
    if policy.keep_every_hours is not None:
        kept |= _every_hours(ordered, policy.keep_every_hours)
    if policy.keep_best is not None:
        validated = [(one.val_loss, one.step) for one in ordered if one.val_loss is not None]
        kept |= {step for _, step in sorted(validated)[: policy.keep_best]}
    return [one.step for one in ordered if one.step not in kept]


class Retention:
    """Deletes what a policy does not keep; for one process of a run."""

    def __init__(self, run_dir: Path, policy: CheckpointConfig) -> None:
        self._run_dir = run_dir
        self._policy = policy
        self._seen: dict[int, tuple[Kept, list[FileRecord]]] = {}
        self._left_alone: set[int] = set()
        self._way_back: int | None = None

    def need(self, at_most: int | None) -> None:
        """Spares the newest checkpoint up to a step, the way back of a run; None ends it."""
        self._way_back = at_most

    def apply(self, *, notice: Callable[[str], None]) -> list[int]:
        """Steps whose checkpoints were deleted.

        One that lacks files or cannot be read does not count as kept and is left as it is, for a
        person; `notice` is told so once, and of those that somebody else deleted.

        Raises:
            CheckpointError: one could not be deleted; the others were.
        """
        doomed = self.doomed(notice=notice)
        self._remove(doomed)
        return doomed

    def doomed(self, *, notice: Callable[[str], None]) -> list[int]:
        """Steps whose checkpoints `apply` would delete now.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        try:
            steps = committed_steps(self._run_dir)
        except OSError as error:
            raise UnreadableCheckpointError.of(checkpoints_folder(self._run_dir), error) from error
        for gone in sorted(self._seen.keys() - set(steps)):
            del self._seen[gone]
            notice(f"{checkpoint_folder(self._run_dir, gone)}: somebody else deleted it")
        found = [self._if_whole(step, notice) for step in steps]
        whole = [one for one in found if one is not None]
        way_back = self._way_back
        needed = [one.step for one in whole if way_back is not None and one.step <= way_back][-1:]
        return [step for step in steps_to_remove(whole, self._policy) if step not in needed]

    def _remove(self, steps: Sequence[int]) -> None:
        # A deletion that failed half way has left its folder under another name.
        left = remove_left_behind(self._run_dir, deletions_only=True).failures
        failures = [(checkpoints_folder(self._run_dir) / name, left[name]) for name in left]
        for step in steps:
            self._seen.pop(step, None)
            try:
                remove_checkpoint(self._run_dir, step)
            except OSError as error:
                failures.append((checkpoint_folder(self._run_dir, step), error))
        if failures:
            folder, reason = failures[0]
            raise CheckpointError(
                f"{folder}: an old checkpoint could not be deleted ({reason}); see to the folder, "
                "the next save tries again"
            ) from reason

    def forget(self, *, after: int) -> None:
        """Takes note that checkpoints after a step were set aside: others may take their names."""
        for step in [step for step in self._seen if step > after]:
            del self._seen[step]

    def _if_whole(self, step: int, notice: Callable[[str], None]) -> Kept | None:
        folder = checkpoint_folder(self._run_dir, step)
        damage: object
        try:
            if step not in self._seen:
                manifest = read_manifest(folder)
                kept = Kept(step, manifest.saved_at, manifest.val_loss)
                self._seen[step] = kept, manifest.files
            kept, files = self._seen[step]
            damage = next(file_damage(folder, files), None)
        except CheckpointError as error:
            damage = error
        if damage is None:
            return kept
        if step not in self._left_alone:
            self._left_alone.add(step)
            notice(f"{damage}; this checkpoint is left as it is and not counted as kept")
        return None


def _every_hours(ordered: Sequence[Kept], hours: float) -> set[int]:
    """The first, and each that is so long after the one before in this set.

    It is the same set however many of those outside of it were deleted in the meantime.
    """
    kept: set[int] = set()
    last: float | None = None
    for one in ordered:
        if one.saved_at is None:
            continue
        # Clocks are set back: what is long before the last is as far from it as what is after.
        if last is None or abs(one.saved_at - last) >= hours * _HOUR_S:
            kept.add(one.step)
            last = one.saved_at
    return kept
