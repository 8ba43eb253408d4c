"""Finds a run that hangs: writes the stacks of all ranks, and leaves so that it is started again.

Each rank has a thread that counts ticks without a sign of life. Ticks, not time: a job that was
suspended as a whole goes on afterwards. The first rank to give up makes the folder
run_dir/hangs/<start of the run>/; its presence tells all others to write their stacks into it and
leave too. Ranks of the same host that a signal has stopped are woken for that (SIGCONT).

A save may take as long as it likes, and waits for other ranks as long as their collectives do. But
a disk that takes nothing of this rank's own part for the whole timeout does not answer.

Limits. The threads need the interpreter's lock: a rank stuck in native code that holds it cannot
give up. The ranks of its host find that it wrote nothing and send it SIGUSR2, at which faulthandler
writes its stacks to standard error from within the signal; to end it is then the launcher's task.
A stopped rank that is alone on its host is woken by nobody, and also ended by the launcher. A
process that waits inside the kernel for a dead file system cannot be ended by anyone, but it has
said on standard error why it should. What a save does without writing (deleting old checkpoints, or
the last fsync of a file whose data is on the disk) is one stage, and must end within the timeout.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from mamba_dist.train.own_part import Writing
from mamba_dist.train.stop import EXIT_STOPPED

_log = logging.getLogger(__name__)

_SHORTEST_TICK_S = 0.05
_LONGEST_TICK_S = 5.0
_TICKS = 8
_GRACE_TICKS = 6
_LEAST_GRACE_S = 2.0


@dataclass(frozen=True)
class Peer:
    """Another rank on this host. A process id may be given again; with its start it is unique."""

    rank: int
    pid: int
    started: int
    """Clock ticks after the boot of the machine."""

    def state(self) -> str | None:
        """The kernel's letter for what it does (T is stopped by a signal), None if it is gone."""
        found = _process_state(self.pid)
        return None if found is None or found[1] != self.started else found[0]

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the process is still there."""
        if self.state() is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Watchdog:
    """Ends the process by exit code 75 if `timeout_s` pass without a sign of life.

    Between `with`'s beginning and end, and not before the first finished step. With `timeout_s`
    None it does nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        timeout_s: float | None,
        peers: Sequence[Peer],
        writing: Callable[[], Writing | None] = lambda: None,
    ) -> None:
        """Watches nothing yet.

        Args:
            folder: of the stacks.
            writing: what this rank has to write itself, which has to go on in a pause too.
        """
        self._folder = folder
        self._rank = rank
        self._peers = tuple(peers)
        self._writing = writing
        self.before_leaving: Callable[[str], None] | None = None
        """Told that the run hangs, and where its stacks are, when this ends the process."""
        self._timeout_s = timeout_s
        self._tick_s = min(_LONGEST_TICK_S, max(_SHORTEST_TICK_S, (timeout_s or 0) / _TICKS))
        self._grace_s = max(_LEAST_GRACE_S, _GRACE_TICKS * self._tick_s)
        self._beats = self._steps = 0
        self._paused = 0
        self._was_there: set[str] = set()
        self._ended = threading.Event()
        self._leaving = threading.Lock()
        self._told = False

    @property
    def last_step(self) -> int | None:
        """The last one that `step_done` was told of."""
        return self._steps or None

    def beat(self) -> None:
        """A sign of life."""
        self._beats += 1

    def step_done(self, step: int) -> None:
        """A sign of life, from the first of which on they are expected."""
        self._steps = step
        self._beats += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is expected inside, but of what this rank writes itself."""
        self._paused += 1
        try:
            yield
        finally:
            self._beats += 1
            self._paused -= 1

    @contextmanager
    def first_time_paused(self, what: str) -> Iterator[None]:
        """Nothing is expected inside, the first time that `what` is done; its end is a sign of
        life each time."""
        if what in self._was_there:
            yield
            self._beats += 1
            return
        self._was_there.add(what)
        with self.paused():
            yield

    def __enter__(self) -> "Watchdog":
        if self._timeout_s is not None:
            # Written by the signal itself, whatever the interpreter does.
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            for name, task in {"hang-count": self._count, "hang-follow": self._follow}.items():
                threading.Thread(target=task, name=name, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._timeout_s is not None:
            faulthandler.unregister(signal.SIGUSR2)

    def _count(self) -> None:
        assert self._timeout_s is not None
        seen: Writing | int | None = None
        idle_s = 0.0
        while not self._ended.wait(self._tick_s):
            idle_s += self._tick_s
            now = self._expected()
            if now is None or now != seen:
                seen, idle_s = now, 0.0
            elif idle_s >= self._timeout_s:
                self._leave(self._idle(now))

    def _expected(self) -> Writing | int | None:
        """What is to change before long; None: nothing."""
        if not self._steps:
            return None
        return self._writing() or (None if self._paused else self._beats)

    def _idle(self, now: Writing | int) -> str:
        if isinstance(now, Writing):
            return (
                f"rank {self._rank} wrote nothing of the save of step {now.step} for "
                f"{self._timeout_s:.4g} s, since the disk does not answer"
            )
        return (
            f"rank {self._rank} got nothing done for {self._timeout_s:.4g} s after step "
            f"{self._steps}"
        )

    def _follow(self) -> None:
        # Apart from the counting: a file system that hangs would stop that too.
        while not self._ended.wait(self._tick_s):
            if self._folder.exists():
                self._leave("another rank hangs")

    def _leave(self, why: str) -> None:
        with self._leaving:
            _within(2 * self._grace_s, lambda: self._report(why))
            if not self._told:
                _within(_LEAST_GRACE_S, lambda: self._report_without_folder(why))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_STOPPED)

    def _report(self, why: str) -> None:
        stopped = [peer.rank for peer in self._peers if peer.state() == "T"]
        try:
            self._folder.mkdir(parents=True)
        except FileExistsError:
            self._told = True  # by another rank
        else:
            self._told = True
            _log.error(
                "the run hangs: %s%s; the stacks of all ranks go to %s, all leave with exit code "
                "%d to be started again (engine.hang_timeout_minutes)",
                why,
                f", rank {', '.join(map(str, stopped))} is stopped by a signal" * bool(stopped),
                self._folder,
                EXIT_STOPPED,
            )
        self._write_stacks()
        if self.before_leaving is not None:
            self.before_leaving(f"the stacks of all ranks are in {self._folder}")
        for peer in self._peers:
            peer.send(signal.SIGCONT)
        # Nobody leaves before all have written: a launcher kills the rest once one is gone.
        if not self._wait_for_peers(self._grace_s / 2):
            for peer in self._missing():
                peer.send(signal.SIGUSR2)
            self._wait_for_peers(self._grace_s / 2)

    def _report_without_folder(self, why: str) -> None:
        """For a disk that does not answer here either."""
        faulthandler.dump_traceback(all_threads=True)
        # Standard error first: the file of the log is beside the folder.
        _log.error(
            "the run hangs: %s; %s could not be made for the stacks, which stand above; leaving "
            "with exit code %d to be started again (engine.hang_timeout_minutes)",
            why,
            self._folder,
            EXIT_STOPPED,
        )

    def _write_stacks(self) -> None:
        path = _stack_file(self._folder, self._rank)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(
                f"rank {self._rank}, process {os.getpid()} on {socket.gethostname()}, {now}: "
                f"last finished step {self._steps}, {self._beats} signs of life\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        partial.rename(path)

    def _wait_for_peers(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._missing():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _missing(self) -> list[Peer]:
        return [
            peer
            for peer in self._peers
            if not _stack_file(self._folder, peer.rank).exists() and peer.state() not in (None, "Z")
        ]


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Does what may hang itself, and waits for it no longer."""
    doing = threading.Thread(target=work, name="hang-report", daemon=True)
    doing.start()
    doing.join(seconds)


def started(pid: int) -> int:
    """When a process of this host began, in clock ticks after the boot; 0 if there is none."""
    found = _process_state(pid)
    return 0 if found is None else found[1]


def _process_state(pid: int) -> tuple[str, int] | None:
    """The state and the start of a process, as /proc tells them."""
    try:
        # The command name, in brackets, may hold spaces; the fields after it do not.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"
