"""Log lines: on standard error for people at a terminal, and of every rank in a file of its own.

On a terminal rank 0 says all, the others only warnings, which name their rank. The file
run_dir/logs/rank-00003.log has every line of its rank at any level that is said, warnings of
libraries, the traceback of what ended it, and of a crash in native code the stacks. It is appended
to by each start, and holds 8 MiB at most; what was before is in rank-00003.old.log, once.

    2026-11-27T02:00:48.123Z START rank 3 of 16, host node01, process 4711; …
    2026-11-27T02:00:52.001Z INFO resumed after step 500 from …
    2026-11-27T02:31:07.250Z END exit code 0 after step 1000, finished

Files, and not one for all: ranks on several nodes cannot append to one file of a network file
system without losing lines, and a collective for the log's sake would wait for a rank that hangs
just when its log is wanted. merged_log.py makes one of them when somebody reads it.
"""

import faulthandler
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

LOGS = "logs"
START: Final = "START"
END: Final = "END"

_MOST_BYTES = 8 << 20
_PACKAGE: Final = "mamba_dist"
_KEEPS_ITS_LINES: Final = "DeepSpeed"


def setup_logging(*, rank: int, world_size: int) -> None:
    """Sends the package's log lines to standard error."""
    package = logging.getLogger(_PACKAGE)
    package.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    who = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False


def log_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's lines are."""
    return run_dir / LOGS / f"rank-{rank:05d}.log"


class RankLog(logging.Handler):
    """Appends lines to a rank's file; one that the disk refuses is lost, and nothing else is.

    A folder that was renamed or deleted is left to whoever has it: the file is made again where it
    was.
    """

    def __init__(self, path: Path, *, native_crashes: bool = False) -> None:
        """Opens the file.

        Args:
            native_crashes: the stacks of a crash in native code go here too.
        """
        super().__init__(logging.INFO)
        self._path = path
        # Whoever has set it up already wants it where it is.
        self._native_crashes = native_crashes and not faulthandler.is_enabled()
        self._descriptor = -1
        self._torn = self._refused = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        # Of a library's arguments, for which no run is to end.
        except Exception:
            self.handleError(record)
            return
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + _traceback_of(record.exc_info[1])
        if not record.name.startswith(_PACKAGE):
            text = f"{record.name}: {text}"
        self.say(record.levelname, text, at=record.created)

    def say(self, kind: str, text: str, *, at: float | None = None) -> None:
        """Appends one line, or several of one moment: those after the first are indented."""
        moment = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
        stamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = f"{stamp} {kind} {text}".replace("\n", "\n  ") + "\n"
        self.acquire()
        try:
            self._append(line.encode(errors="replace"))
            self._refused = False
        except OSError as error:
            self._tell_refusal(error)
        finally:
            self.release()

    def close(self) -> None:
        """Ends the writing."""
        self._leave()
        super().close()

    def _append(self, line: bytes) -> None:
        if not self._is_in_place():
            self._open()
        elif os.fstat(self._descriptor).st_size > _MOST_BYTES:
            os.replace(self._path, self._path.with_suffix(".old.log"))
            self._open()
        if self._torn:
            line = b"\n" + line
        self._torn = os.write(self._descriptor, line) < len(line)

    def _is_in_place(self) -> bool:
        try:
            named = self._path.stat()
        except FileNotFoundError:
            return False
        return self._descriptor >= 0 and os.path.samestat(named, os.fstat(self._descriptor))

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        opened = os.open(self._path, flags, 0o666)
        if self._native_crashes:
            faulthandler.enable(opened)
        self._close_descriptor()
        self._descriptor = opened
        # A kill may have cut the last line of the start before.
        self._torn = os.fstat(opened).st_size > 0 and not _ends_whole(self._path)

    def _leave(self) -> None:
        if self._native_crashes:
            faulthandler.disable()
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _tell_refusal(self, error: OSError) -> None:
        if not self._refused:
            self._refused = True
            # Not by the log, whose handler this is.
            print(f"{self._path} cannot be written ({error.strerror})", file=sys.stderr)


@contextmanager
def logging_to(log: RankLog) -> Iterator[None]:
    """The lines of the package, of libraries from warnings on, Python's warnings and what ends a
    thread go to a rank's file too."""
    package, others = logging.getLogger(_PACKAGE), [logging.getLogger()]
    if not logging.getLogger(_KEEPS_ITS_LINES).propagate:
        others.append(logging.getLogger(_KEEPS_ITS_LINES))
    shown, ended = warnings.showwarning, threading.excepthook

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        shown(message, category, *place, **more)
        # Also as a line of its own where it came from, without the source that shown() adds.
        log.say("WARNING", f"{place[0]}:{place[1]}: {category.__name__}: {message}")

    def end(arguments: threading.ExceptHookArgs) -> None:
        ended(arguments)
        if arguments.exc_value is not None:
            log.say("ERROR", "a thread ended\n" + _traceback_of(arguments.exc_value))

    libraries = _FromWarningsOn(log)
    package.addHandler(log)
    for logger in others:
        logger.addHandler(libraries)
    warnings.showwarning, threading.excepthook = show, end
    try:
        yield
    finally:
        warnings.showwarning, threading.excepthook = shown, ended
        package.removeHandler(log)
        for logger in others:
            logger.removeHandler(libraries)


class _FromWarningsOn(logging.Handler):
    """Hands on what libraries say, of which only warnings are of interest."""

    def __init__(self, log: RankLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.handle(record)
        # What Python shows of loggers without any handler, for which this one counts.
        if logging.lastResort is not None and not self._has_company(record.name):
            logging.lastResort.handle(record)

    def _has_company(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _ends_whole(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
    return True
