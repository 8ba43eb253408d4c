"""Every start of a run and how it ended, in run_dir/starts.jsonl; and whether one is going on.

    {"event": "start", "at": …, "hosts": […], "ranks": 16, "launcher": "srun", "job": "77", …}
    {"event": "training", "of": …, "step": 500, "total_steps": 1000, …}
    {"event": "end", "of": …, "reason": "stopped", "detail": "SIGUSR1", "exit_code": 75, …}

`of` is the time of the start, since a folder that was deleted may be another run's when the first
one ends. Only rank 0 writes. Each line is one write at the end of the file; one that a kill cut, or
that is none of these, is passed over by readers. A start without an end was killed, or its node was
lost: only the logs know more.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

STARTS_FILE = "starts.jsonl"
LOCK = "lock"
"""Held by an exclusive flock while a run trains in its folder."""

Reason = Literal[
    "finished", "stopped", "interrupted", "hang", "shortage", "diverged", "mistake", "crash"
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One start of a run; what was not recorded is None or empty."""

    at: float
    """Seconds since 1970, as all instants here."""
    hosts: tuple[str, ...] = ()
    ranks: int = 0
    launcher: str = ""
    job: str | None = None
    pid: int | None = None
    """Of rank 0."""
    versions: Mapping[str, str] = field(default_factory=dict)
    first_step: int | None = None
    """Steps that were done when it began to train; None: it never did."""
    total_steps: int | None = None
    ended_at: float | None = None
    reason: Reason | None = None
    """None: it goes on, or was killed."""
    detail: str = ""
    exit_code: int | None = None
    last_step: int | None = None


class StartsFile:
    """Appends to the file; what the disk refuses is said in the log, and no reason to end a run."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / STARTS_FILE
        self._began_at = 0.0

    def begin(
        self,
        *,
        hosts: Sequence[str],
        ranks: int,
        launcher: str,
        job: str | None,
        versions: Mapping[str, str],
    ) -> None:
        """A start, of which nothing else is known yet."""
        # Its lines know each other by it: to the microsecond, in which no start can be written.
        self._began_at = round(time.time(), 6)
        self._append(
            "start",
            at=self._began_at,
            hosts=list(hosts),
            ranks=ranks,
            launcher=launcher,
            job=job,
            pid=os.getpid(),
            versions=dict(versions),
        )

    def train(self, *, first_step: int, total_steps: int) -> None:
        """It is built, and trains from here on."""
        self._tell("training", step=first_step, total_steps=total_steps)

    def end(self, reason: Reason, *, detail: str, exit_code: int, step: int | None) -> None:
        """It has ended."""
        self._tell("end", reason=reason, detail=detail, exit_code=exit_code, step=step)

    def _tell(self, event: str, **fields: Any) -> None:
        self._append(event, of=self._began_at, at=round(time.time(), 6), **fields)

    def _append(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields}) + "\n"
        try:
            with self._path.open("ab+", buffering=0) as file:
                whole = not file.tell() or _last_byte(file.fileno()) == b"\n"
                file.write((b"" if whole else b"\n") + line.encode())
                os.fsync(file.fileno())
        except OSError as error:
            _log.error("%s cannot be written (%s)", self._path, error.strerror)


def read_starts(run_dir: Path) -> list[Start]:
    """All starts of a run, oldest first; empty if none was recorded.

    Raises:
        OSError: the file is there and cannot be read.
    """
    path = run_dir / STARTS_FILE
    if not path.is_file():
        return []
    found: dict[float, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        with suppress(KeyError, TypeError):
            _take(_parsed(line), found)
    return [Start(**fields) for fields in found.values()]


def is_held(run_dir: Path) -> bool | None:
    """Whether a run holds the folder, as far as the file system tells other hosts; None: it knows
    no locks, or the lock cannot be read.

    The lock is shared for a moment, which a run that wants it waits for.
    """
    try:
        with (run_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _take(event: Mapping[str, Any], found: dict[float, dict[str, Any]]) -> None:
    kind, own = event.get("event"), found.get(event.get("of", 0.0))
    if not isinstance(event["at"], int | float):
        return
    if kind == "start" and isinstance(event["ranks"], int):
        found[event["at"]] = _fields_of_start(event)
    elif own is not None and kind == "training":
        own |= {"first_step": event["step"], "total_steps": event["total_steps"]}
    elif own is not None and kind == "end" and event["reason"] in get_args(Reason):
        own |= {
            "ended_at": event["at"],
            "reason": event["reason"],
            "detail": event["detail"],
            "exit_code": event["exit_code"],
            "last_step": event["step"],
        }


def _fields_of_start(event: Mapping[str, Any]) -> dict[str, Any]:
    known = ("at", "ranks", "launcher", "job", "pid", "versions")
    return {name: event[name] for name in known} | {"hosts": tuple(event["hosts"])}


def _parsed(line: bytes) -> dict[str, Any]:
    """The fields of a line; none if it was cut."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _last_byte(descriptor: int) -> bytes:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)
