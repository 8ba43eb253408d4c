"""The saves of a run: beside training or holding it up, one at a time, old ones deleted after.

A save that falls due while one is being written waits for it, so that memory holds one copy of the
state and the disk falls behind by one save at most. A stop does too: what is nearly written is
safe sooner than what is not begun.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from mamba_dist.checkpoint.background import BackgroundSave, Task
from mamba_dist.checkpoint.free_memory import available_bytes
from mamba_dist.checkpoint.host_copy import HostCopy, copy_bytes
from mamba_dist.checkpoint.ranks import Ranks
from mamba_dist.checkpoint.retention import Retention
from mamba_dist.checkpoint.store import Snapshot, save_checkpoint
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.engine.base import Fragment
from mamba_dist.errors import CheckpointError
from mamba_dist.train.own_part import OwnPart, Writing

_log = logging.getLogger(__name__)

# Training goes on to allocate.
_COPY_SHARE: Final = 0.75
# Launchers give the ranks 30 s after one has left with an error.
_LAST_RESORT_S: Final = 15.0


class Saver:
    """Writes the checkpoints of a run and applies its retention; all ranks call it alike."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        *,
        fragments: Callable[[], Iterable[Fragment]],
        ranks: Ranks,
        ranks_on_host: int = 1,
        copies_ahead: bool = True,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        """Writes nothing yet.

        Args:
            fragments: those of the engine, and of every snapshot that is given to `save`.
            copies_ahead: saves are due before the last one, which is made without a copy.
            available: see `available_bytes`.
        """
        self._run_dir = run_dir
        self._mode = config.save_mode
        self._fragments = fragments
        self._ranks = OwnPart(ranks)
        self._ranks_on_host = ranks_on_host
        self._copies_ahead = copies_ahead
        self._available = available
        self._retention = Retention(run_dir, config)
        self._copy: HostCopy | None = None
        self._taking: Task | None = None
        self._copying: HostCopy | None = None
        self._in_flight: BackgroundSave | None = None
        self._told = False

    @property
    def vote(self) -> float:
        """This rank's number, to be added up over ranks after each step and given to `hear`."""
        return 0.0 if self._in_flight is None else self._in_flight.vote

    @property
    def busy(self) -> bool:
        """Whether a save is in flight; the same on all ranks."""
        return self._in_flight is not None

    @property
    def writing(self) -> Writing | None:
        """What this rank itself has to write, or waits for its writer to write, before training
        goes on; for any thread."""
        return self._ranks.now()

    def hear(self, votes: float) -> None:
        """Goes on with the save in flight, and says so if it has failed.

        Raises:
            CheckpointError: on all ranks, if there is no memory to save as the config wants it.
        """
        if self._in_flight is not None:
            self._in_flight.hear(votes)
            self._settle()
        elif self._copies_ahead:
            # After a first step, which has taken the memory that training needs.
            self._prepare()

    def save(self, snapshot: Snapshot, *, must_succeed: bool) -> None:
        """Saves the state as it is now; it may be changed after the next `hold_update`.

        Raises:
            CheckpointError: on all ranks, if it `must_succeed` and could not be written. Such a
                save is always waited for.
        """
        self.finish()
        try:
            copy = None if must_succeed else self._ready_copy()
            with self._ranks.of_save(snapshot.progress.step):
                self._write(snapshot, copy)
        except CheckpointError as error:
            if must_succeed:
                raise
            # Training goes on: the next save may find a disk with room again.
            _log.error("%s", error)

    def hold_update(self) -> None:
        """Returns when the state may be changed: a save has its copy of it."""
        if self._copying is not None:
            self._copying.hold_updates()
            self._copying = None

    def finish(self) -> None:
        """Waits for the save in flight, so that the newest checkpoint is the newest save.

        All ranks call it at the same point of their work.
        """
        if self._in_flight is None:
            return
        began, step = time.perf_counter(), self._in_flight.step
        with self._ranks.of_save(step):
            self._in_flight.finish()
        self._settle()
        waited_s = time.perf_counter() - began
        _log.info("waited %.1f s for the save of step %d to be written", waited_s, step)

    def need(self, at_most: int | None) -> None:
        """Spares the newest checkpoint up to a step from here on; None ends it."""
        self._retention.need(at_most)

    def forget(self, *, after: int) -> None:
        """Takes note that checkpoints after a step were set aside, while no save is in flight."""
        self._retention.forget(after=after)

    def clear_old(self) -> None:
        """Deletes what retention does not keep; what cannot be deleted is said, and stays."""
        if self._ranks.rank == 0:
            try:
                self._retention.apply(notice=_log.warning)
            except (CheckpointError, OSError) as error:
                _log.error("%s", error)

    def close(self) -> None:
        """For a rank that leaves with an error: it cannot ask the others any more.

        A save in flight is still committed if they have written their parts.
        """
        save, self._in_flight = self._in_flight, None
        if save is None:
            return
        try:
            save.finish_alone(wait_s=_LAST_RESORT_S)
        except Exception as error:
            # Another one is on its way.
            _log.error("step %d was not saved: %s", save.step, error)

    def _prepare(self) -> None:
        """Begins to take the memory of a copy, if saves are to be made from one."""
        if self._mode == "streaming" or self._taking is not None:
            return
        needed = self._ranks_on_host * copy_bytes(self._fragments())
        free = self._available()
        if self._ranks.any_rank(needed > _COPY_SHARE * free):
            self._go_without_copy(f"it takes {_gib(needed)} on a host with {_gib(free)} free")
        else:
            self._taking = Task(self._take_memory)

    def _write(self, snapshot: Snapshot, copy: HostCopy | None) -> None:
        """From the copy beside training, or at once if there is none."""
        if copy is not None:
            self._begin(snapshot, copy)
            return
        folder = save_checkpoint(
            self._run_dir, snapshot, ranks=self._ranks, wrote=self._ranks.wrote
        )
        if self._ranks.rank == 0:
            self._committed(folder)

    def _begin(self, snapshot: Snapshot, copy: HostCopy) -> None:
        copied = replace(snapshot, fragments=copy.begin(snapshot.fragments))
        self._told = False
        self._in_flight = BackgroundSave(
            self._run_dir,
            copied,
            ranks=self._ranks,
            complete=copy.complete,
            committed=self._committed,
            wrote=self._ranks.wrote,
        )
        self._copying = copy

    def _take_memory(self) -> None:
        self._copy = HostCopy(self._fragments())

    def _ready_copy(self) -> HostCopy | None:
        """None: saves are to be made without."""
        self._prepare()
        if self._taking is None:
            return None
        self._taking.join()
        if self._ranks.any_rank(self._copy is None):
            self._copy = None
            self._go_without_copy(str(self._taking.error or "another rank could not take it"))
        return self._copy

    def _go_without_copy(self, why: str) -> None:
        text = f"no memory for a copy of the training state ({why})"
        if self._mode == "async":
            raise CheckpointError(
                f"checkpoint.save_mode is async, but there is {text}; set it to streaming"
            )
        self._mode, self._taking = "streaming", None
        _log.warning("%s: saves hold up training until they are written", text)

    def _committed(self, folder: Path) -> None:
        _log.info("saved %s", folder)
        self.clear_old()

    def _settle(self) -> None:
        save = self._in_flight
        assert save is not None
        if save.failure is not None and not self._told:
            self._told = True
            # Training goes on: the next save may find a disk with room again.
            _log.error("%s", save.failure)
        if save.ended:
            self._in_flight = None


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
