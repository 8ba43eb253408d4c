"""Worker processes with one pipe each: started fresh (spawn), never outliving their parent.

A worker is a function `(connection, payload)` in a module of this package that imports no torch, so
that starting one costs a fraction of a second. Spawn, since a fork beside the tokenizers' threads
deadlocks. A crew (crew.py) is what shares out tasks among several and replaces those that die.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

_END_S = 5.0


@dataclass(frozen=True)
class Worker:
    """One running process and this side of its pipe."""

    process: SpawnProcess
    connection: Connection

    def end_signal(self) -> signal.Signals | None:
        """The signal that killed a dead worker, None if it ended otherwise."""
        self.process.join(_END_S)
        code = self.process.exitcode
        return signal.Signals(-code) if code is not None and code < 0 else None

    def describe_end(self) -> str:
        """How a dead worker ended, for an error message."""
        if (killer := self.end_signal()) is not None:
            return f"killed by {killer.name}" + " (out of memory?)" * (killer == signal.SIGKILL)
        return f"exit code {self.process.exitcode}, its own message is above"


@dataclass(frozen=True)
class WorkerFailure:
    """What a worker sends instead of a result when the user has to mend something."""

    message: str


def start_workers(
    target: Callable[[Connection, Any], None], payloads: Sequence[Any]
) -> list[Worker]:
    """One running worker for each payload.

    Raises:
        OSError: the machine has no room for a process more.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[Worker] = []
    for payload in payloads:
        try:
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(target, theirs, payload), daemon=True)
            process.start()
        except OSError:
            stop_workers(workers)
            raise
        # Runs before multiprocessing's own clean-up, which would wait for ever for a worker that
        # takes no SIGTERM.
        atexit.register(process.kill)
        # The worker must hold the only other end, or its death would not be seen as the end of the
        # pipe.
        theirs.close()
        workers.append(Worker(process, ours))
    return workers


def stop_workers(workers: Sequence[Worker]) -> None:
    """Ends the workers, whatever they are doing, and waits until they are gone."""
    for worker in workers:
        worker.connection.close()
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        atexit.unregister(worker.process.kill)


def _run(target: Callable[[Connection, Any], None], connection: Connection, payload: Any) -> None:
    # Ctrl-C and a cluster's signals reach the whole group; the parent decides what they mean, and
    # may want to go on for a while, to write a checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    target(connection, payload)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
