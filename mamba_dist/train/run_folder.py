"""The folder of a run: where it is, and the lock by which one run alone writes into it."""

import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mamba_dist.checkpoint.layout import remove_left_behind
from mamba_dist.checkpoint.store import finish_saves
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.world import World
from mamba_dist.errors import CheckpointError, TrainingError, UnreadableCheckpointError
from mamba_dist.telemetry.starts import LOCK

_log = logging.getLogger(__name__)

# Other nodes remember for so long what was not there (acdirmax of NFS).
_APPEARS_WITHIN_S = 60.0
# Somebody who only asks whether the lock is held has it for a moment.
_ASKED_WITHIN_S = 1.0


def run_folder(config: RunConfig) -> Path:
    """The folder of the run; set by loading a config file."""
    if config.training.run_dir is None:
        raise ValueError("training.run_dir is filled in when a config is loaded from a file")
    return Path(config.training.run_dir)


class HeldFolder:
    """A run folder that rank 0 holds for this run alone.

    The kernel releases the lock when the process ends, however it ends.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir = run_dir
        self._world = world
        self._lock: TextIO | None = None
        self._mark = ""

    def take(self) -> None:
        """Makes the folder and holds it.

        Raises:
            TrainingError: on all ranks, if another run holds the folder or it cannot be written.
        """
        problem = ""
        [number] = self._world.from_first([secrets.randbits(48)])
        self._mark = f"{number:012x}\n"
        if self._world.rank == 0:
            try:
                _write(self._hold(), self._mark)
            except BlockingIOError:
                problem = _taken()
            except OSError as error:
                problem = f"cannot be written or locked ({error.strerror}); set training.run_dir=…"
        self._agree(problem)

    def settle(self) -> None:
        """Finishes the saves that a kill has left in the folder, and removes what cannot be.

        Raises:
            CheckpointError: on all ranks; a save that lacks nothing cannot be committed, or nobody
                can say whether it lacks something, and it is left as it is.
        """
        refusal: CheckpointError | None = None
        if self._world.rank == 0:
            try:
                self._settle()
            except CheckpointError as error:
                refusal = error
            except OSError as error:
                refusal = UnreadableCheckpointError.of(self._run_dir, error)
        [code] = self._world.from_first([0 if refusal is None else refusal.exit_code])
        if code:
            told = refusal or CheckpointError(f"{self._run_dir}: rank 0 says what is wrong in it")
            told.exit_code = code
            told.of_one_rank = refusal is not None
            raise told

    def _settle(self) -> None:
        for folder in finish_saves(self._run_dir):
            _log.warning("committed %s, all of which an interrupted save left", folder)
        done = remove_left_behind(self._run_dir)
        for name in done.removed:
            _log.warning("removed %s, which an interrupted save left behind", name)
        for name, error in done.failures.items():
            _log.warning(
                "%s, which an interrupted save left behind, cannot be removed (%s)",
                name,
                error.strerror or error,
            )

    def is_seen(self) -> bool:
        """Whether this rank sees what rank 0 wrote there, which may take a minute to appear.

        A folder of the same name on a disk of this node may hold the lock of another run.
        """
        path, mark = self._run_dir / LOCK, self._mark.encode()
        return appears(lambda: path.exists() and path.read_bytes() == mark)

    def require(self) -> None:
        """Returns while nobody else can write there; a folder that was deleted is held again.

        Raises:
            TrainingError: on all ranks, if it was deleted and another run holds the new one.
        """
        problem = ""
        if self._world.rank == 0 and not self._is_held():
            _log.error("%s was deleted while the run trains; it is made again", self._run_dir)
            try:
                self._hold()
            except BlockingIOError:
                problem = f"was deleted, and {_taken()}"
            except OSError as error:
                # What is to be written there says the same; until then training goes on.
                _log.error("%s: cannot be written or locked (%s)", self._run_dir, error.strerror)
        self._agree(problem)

    def release(self) -> None:
        """Lets the next run have it."""
        if self._lock is not None:
            self._lock.close()

    def _hold(self) -> TextIO:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        # What stands there may be another run's, and is then not to be touched.
        lock = (self._run_dir / LOCK).open("a", encoding="utf-8")
        try:
            _lock(lock)
        except OSError:
            lock.close()
            raise
        self.release()
        self._lock = lock
        return lock

    def _is_held(self) -> bool:
        try:
            named = (self._run_dir / LOCK).stat()
        except OSError:
            return False
        return self._lock is not None and os.path.samestat(named, os.fstat(self._lock.fileno()))

    def _agree(self, problem: str) -> None:
        if self._world.any_rank(bool(problem)):
            error = TrainingError(f"{self._run_dir}: {problem or 'another rank says why'}")
            error.of_one_rank = bool(problem)
            raise error


@contextmanager
def held_run_folder(config: RunConfig, *, world: World) -> Iterator[HeldFolder]:
    """The folder of the run, held while the block lasts.

    Raises:
        TrainingError: on all ranks, if another run holds the folder or it cannot be written.
    """
    folder = HeldFolder(run_folder(config), world)
    try:
        folder.take()
        yield folder
    finally:
        folder.release()


def appears(is_there: Callable[[], bool]) -> bool:
    """Whether it comes true while a network file system may still show this node an older state."""
    deadline = time.monotonic() + _APPEARS_WITHIN_S
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _taken() -> str:
    return "another run is training in it; wait for its end, or set training.run_dir=…"


def _lock(file: TextIO) -> None:
    deadline = time.monotonic() + _ASKED_WITHIN_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
    # Else a network file system may keep it to this node.
    os.fsync(file.fileno())
