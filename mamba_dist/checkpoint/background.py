"""A save that goes on while training does: each rank's thread writes, then rank 0's commits.

Threads call no collective: torch's are not made for two threads of a process, and the order in
which ranks call them would be anyone's guess. Instead each rank has a vote, one number, which
training adds up with what it adds up anyway, and all ranks hear the sum at the same step.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mamba_dist.checkpoint.layout import checkpoint_folder, staging_folder
from mamba_dist.checkpoint.rank_file import write_rank
from mamba_dist.checkpoint.ranks import Ranks
from mamba_dist.checkpoint.staged import records_are_complete
from mamba_dist.checkpoint.store import Snapshot, commit, not_written, prepare_staging
from mamba_dist.errors import CheckpointError

_POLL_S = 0.1


class BackgroundSave:
    """One save, from the staging folder to the commit; all ranks make and ask it alike."""

    def __init__(
        self,
        run_dir: Path,
        snapshot: Snapshot,
        *,
        ranks: Ranks,
        complete: Callable[[], None],
        committed: Callable[[Path], None],
        wrote: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins to write `snapshot`, whose fragments nobody may change until it has ended.

        Args:
            complete: returns when the fragments are there to be read; called on the thread.
            committed: is called on rank 0's thread, with the folder, before the save has ended.
            wrote: see `write_rank`; called on the thread.

        Raises:
            CheckpointError: on every rank, if the staging folder cannot be made.
        """
        self.step = snapshot.progress.step
        self.failure: CheckpointError | None = None
        """Why it will not be committed; on all ranks at the same step."""
        self.ended = False
        """Committed, or failed and nothing left of it."""
        self._folder = checkpoint_folder(run_dir, self.step)
        self._staging = staging_folder(run_dir, self.step)
        self._ranks = ranks
        self._committed = committed
        self._committing = False
        self._abandoned = threading.Event()
        self._wrote = wrote
        self._blocks = 0
        prepare_staging(run_dir, snapshot, ranks=ranks)

        def write() -> None:
            complete()
            write_rank(
                self._staging,
                ranks.rank,
                snapshot.fragments,
                beside=True,
                abandoned=self._abandoned.is_set,
                wrote=self._note_block,
            )

        self._task = Task(write)

    @property
    def vote(self) -> float:
        """What is to be added up over ranks and given to `hear`."""
        if not self._task.done:
            return 0
        # More than all ranks that are well together.
        return 1 if self._task.error is None else self._ranks.size + 1

    def hear(self, votes: float) -> None:
        """Goes on as all ranks have voted."""
        failed, well = divmod(int(votes), self._ranks.size + 1)
        if failed:
            self._fail()
        if failed + well == self._ranks.size:
            self._next_stage()

    def finish(self) -> None:
        """Waits until it has ended; called by all ranks at the same point of their work."""
        while not self.ended:
            self._task.join()
            if self._ranks.any_rank(self._task.error is not None):
                self._fail()
            self._next_stage()

    def finish_alone(self, *, wait_s: float) -> None:
        """Commits it if that needs no word of the others; for a rank that leaves with an error.

        What they have written stands in the folder; rank 0 waits so long for it, and each rank for
        a disk that does nothing.

        Raises:
            CheckpointError: the disk does not answer.
            OSError: the commit could not be written.
        """
        self._join_while_it_writes(wait_s)
        if self._ranks.rank != 0 or self._committing or self.failure or self._task.error:
            return
        deadline = time.monotonic() + wait_s
        while not records_are_complete(self._staging, ranks=self._ranks.size):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)
        self._task = Task(self._commit)
        self._join_while_it_writes(wait_s)
        if self._task.error is not None:
            raise self._task.error

    def _join_while_it_writes(self, at_most_s: float) -> None:
        seen = self._blocks
        while not self._task.join(at_most_s):
            if self._blocks == seen:
                raise CheckpointError(f"{self._staging}: nothing was written for {at_most_s:.4g} s")
            seen = self._blocks

    def _note_block(self) -> None:
        self._blocks += 1
        self._wrote()

    def _fail(self) -> None:
        if self.failure is None:
            own = self._task.error
            self.failure = not_written(self._staging, own)
            self._abandoned.set()

    def _next_stage(self) -> None:
        if self.failure is not None and self._ranks.rank == 0:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.ended = self._committing or self.failure is not None
        self._committing = True
        if not self.ended and self._ranks.rank == 0:
            self._task = Task(self._commit)

    def _commit(self) -> None:
        commit(self._staging, self._folder)
        self._committed(self._folder)


class Task:
    """Work on a thread of its own, which a process does not wait for at its end."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="save")
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """Whether it is done, after so long at most."""
        self._thread.join(timeout_s)
        return self.done

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            # Whatever it was: a save that nobody hears of again would never end.
            self.error = error
