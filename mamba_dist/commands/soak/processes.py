"""The processes of a launch, found by an environment variable that all of them inherit."""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

RANK_MODULE = "mamba_dist.commands.soak.rank"
_LAUNCHERS = ("torchrun", "deepspeed", "deepspeed.launcher.launch", "env")
_POLL_S = 0.02


def processes_with(variable: str) -> dict[int, list[str]]:
    """The command lines, by process id, of those in whose environment stands NAME=VALUE.

    Zombies have neither and are not among them.
    """
    wanted, found = variable.encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        # They come and go, and those of others cannot be read.
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(entry.name)] = words
    return found


def ranks_with(variable: str) -> list[int]:
    """Process ids of the training processes among them, in the order in which they were started."""
    return sorted(
        pid
        for pid, words in processes_with(variable).items()
        if RANK_MODULE in words and not any(Path(word).name in _LAUNCHERS for word in words)
    )


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for_end(variable: str, *, timeout_s: float) -> dict[int, list[str]]:
    """What is left of them after so long; nothing as soon as nothing is."""
    deadline = time.monotonic() + timeout_s
    while (left := processes_with(variable)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def kill_all(variable: str) -> None:
    """Ends them, and what they start meanwhile."""
    while left := processes_with(variable):
        send(left, signal.SIGKILL)
        time.sleep(_POLL_S)
