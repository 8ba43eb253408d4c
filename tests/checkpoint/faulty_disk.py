"""Saves of two ranks, as threads, on a disk that fails at a chosen change of it.

A change is a new folder, a written file (before it, and half of it), an fsync, a rename, a removal.
The functions that make them are replaced by name while a save runs; only the ranks' own calls
count, each rank's from 1. Before change n+1 is after change n.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from written_checkpoint import fragments_of, snapshot

from mamba_dist.checkpoint import rank_file
from mamba_dist.checkpoint.layout import checkpoints_folder
from mamba_dist.checkpoint.retention import Retention
from mamba_dist.checkpoint.store import save_checkpoint
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.errors import CheckpointError

RANKS = 2
Fault = Literal["kill one", "kill all", "full", "read-only", "deleted", None]


class Killed(BaseException):
    """The end of a process: no handler of errors sees it."""


@dataclass
class FaultyDisk:
    """What happens at change `at` of rank `victim`; `full` and `read-only` last until the end of
    the save."""

    run_dir: Path
    fault: Fault = None
    victim: int = 0
    at: int = 0
    struck: bool = False
    changes: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(RANKS), 0))

    def __post_init__(self) -> None:
        self._mine = threading.local()
        self._meeting = threading.Barrier(RANKS)
        self._flags = [False] * RANKS

    def enter(self, rank: int) -> None:
        """This thread is that rank from here on."""
        self._mine.rank = rank

    def meet(self, flag: bool) -> bool:
        """`any_rank`; fails as gloo does once the other is dead."""
        rank = self._mine.rank
        self._flags[rank] = flag
        try:
            self._meeting.wait(60)
            found = any(self._flags)
            self._meeting.wait(60)
        except threading.BrokenBarrierError:
            raise RuntimeError("Connection closed by peer") from None
        return found

    def die(self) -> None:
        """The other rank's next collective fails."""
        self._meeting.abort()

    def change(self) -> None:
        """A change of the disk is about to be made by this thread."""
        rank = getattr(self._mine, "rank", None)
        if rank is None:
            return
        if self.struck and self.fault == "kill all":
            raise Killed
        self.changes[rank] += 1
        chosen = rank == self.victim and self.changes[rank] == self.at
        if chosen:
            self.struck = True
        if self.struck and self.fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.struck and self.fault == "read-only":
            raise OSError(errno.EROFS, "Read-only file system")
        if chosen and self.fault == "deleted":
            self._mine.rank = None
            shutil.rmtree(checkpoints_folder(self.run_dir), ignore_errors=True)
            self._mine.rank = rank
        elif chosen and self.fault is not None:
            raise Killed

    def replace(self, patched: pytest.MonkeyPatch) -> None:
        """Puts this disk under the code that saves."""
        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            patched.setattr(os, name, self._counted(getattr(os, name)))
        write_text, write_tensors = Path.write_text, rank_file.write_tensors

        def write_halves(path: Path, text: str, **options: Any) -> None:
            self.change()
            write_text(path, text[: len(text) // 2], **options)
            self.change()
            write_text(path, text, **options)

        def write_tensors_halves(path: Path, *arguments: Any, **options: Any) -> Any:
            self.change()
            written = write_tensors(path, *arguments, **options)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.change()
            path.write_bytes(whole)
            return written

        patched.setattr(Path, "write_text", write_halves)
        patched.setattr(rank_file, "write_tensors", write_tensors_halves)

    def _counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.change()
            return change(*arguments, **options)

        return counted


class ThreadRank:
    """One of the ranks of a save."""

    size = RANKS

    def __init__(self, rank: int, disk: FaultyDisk) -> None:
        self.rank = rank
        self._disk = disk

    def any_rank(self, flag: bool) -> bool:
        return self._disk.meet(flag)


@dataclass(frozen=True)
class Saved:
    """How each rank came out of a save: None is well."""

    endings: dict[int, BaseException | None]
    said: list[str]

    @property
    def killed(self) -> bool:
        return any(isinstance(ending, Killed) for ending in self.endings.values())


def save(disk: FaultyDisk, step: int, retention: Retention | None = None) -> Saved:
    """A save of the made-up state by both ranks, and retention as the loop applies it."""
    endings: dict[int, BaseException | None] = {}
    said: list[str] = []
    retention = retention or Retention(disk.run_dir, CheckpointConfig(keep_last=1))

    def run(rank: int) -> None:
        disk.enter(rank)
        endings[rank] = None
        try:
            taken = snapshot(step, fragments=fragments_of(step, rank=rank, size=RANKS))
            save_checkpoint(disk.run_dir, taken, ranks=ThreadRank(rank, disk))
            if rank == 0:
                retention.apply(notice=said.append)
        except BaseException as error:
            endings[rank] = error
            if not isinstance(error, CheckpointError):
                disk.die()

    with pytest.MonkeyPatch.context() as patched:
        disk.replace(patched)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    return Saved(endings, said)
