"""Being told to stop: signals, and a launcher that died.

SIGTERM, SIGUSR1 (SLURM's warning) and one SIGINT ask for a checkpoint and a clean exit; a second
SIGINT leaves at once. A SIGTERM to the `deepspeed` command kills only that process, so each rank
also watches its launcher and takes its death for a SIGTERM.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was stopped and can go on (EX_TEMPFAIL): start it again to continue."""
EXIT_INTERRUPTED = 130
"""Exit code of a rank that a second SIGINT ended at once, as shells name that."""

_LAST_WORDS_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A flag that signals set; ranks agree on it once per step."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._have_met = threading.Event()
        self._arrivals: socket.socket | None = None
        self.before_leaving: Callable[[], None] | None = None
        """Called when a second SIGINT ends the process; it has a second."""

    @property
    def reason(self) -> str | None:
        """Why this process should stop, or None."""
        return self._reason

    @property
    def have_met(self) -> bool:
        """Whether `ranks_met` was called."""
        return self._have_met.is_set()

    def ask(self, reason: str) -> None:
        """Asks for a stop; the first reason stays."""
        self._reason = self._reason or reason

    def ranks_met(self) -> None:
        """All ranks are there, and agree on a stop from here on."""
        self._have_met.set()

    def listen(self) -> None:
        """Takes the signals; call from the main thread.

        A thread acts on them, told by the interpreter from within the signal: the main thread may
        wait in a collective for a rank that has left, where it would not see a second SIGINT.
        """
        here, self._arrivals = socket.socketpair()
        self._arrivals.setblocking(False)
        signal.set_wakeup_fd(self._arrivals.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _nothing)
        threading.Thread(target=self._act, args=(here,), name="signals", daemon=True).start()

    def release(self) -> None:
        """Gives the signals back to their defaults: from here on they end the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        if self._arrivals is not None:
            self._arrivals.close()

    def _act(self, arrivals: socket.socket) -> None:
        interrupts = 0
        with arrivals:
            while numbers := arrivals.recv(1):
                [number] = numbers
                # Only they count: a launcher adds a SIGTERM of its own to a first Ctrl-C.
                interrupts += number == signal.SIGINT
                if interrupts == 2:
                    self._leave()
                if number in _SIGNALS:
                    self.ask(signal.Signals(number).name)

    def _leave(self) -> None:
        if self.before_leaving is not None:
            last = threading.Thread(target=self.before_leaving, name="leaving", daemon=True)
            last.start()
            last.join(_LAST_WORDS_S)
        os._exit(EXIT_INTERRUPTED)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def watch_launcher(stop: StopRequest, pids: Sequence[int], *, poll_s: float = 0.5) -> None:
    """Asks for a stop as soon as one of the launcher's processes is gone.

    Before the ranks have met it ends this one: they meet at the launcher's store, or wait for ranks
    that it did not come to start, up to the timeout of collectives.
    """
    if not pids:
        return

    def watch() -> None:
        pause = threading.Event()
        while all(_alive(pid) for pid in pids):
            pause.wait(poll_s)
        stop.ask("the launcher died")
        if not stop.have_met:
            print("the launcher died before the ranks had met", file=sys.stderr, flush=True)
            os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    # A zombie is dead, only not yet reaped by its parent.
    return fields[0] != "Z"
