"""Being told to stop: signals, and a launcher that died.

SIGTERM, SIGUSR1 (SLURM's warning) and one SIGINT ask for a checkpoint and a clean exit; a second
SIGINT leaves at once. A SIGTERM to the `deepspeed` command kills only that process, so each rank
also watches its launcher and takes its death for a SIGTERM.
"""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was stopped and can go on (EX_TEMPFAIL): start it again to continue."""


class StopRequest:
    """A flag that signals set; ranks agree on it once per step."""

    def __init__(self) -> None:
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why this process should stop, or None."""
        return self._reason

    def ask(self, reason: str) -> None:
        """Asks for a stop; the first reason stays."""
        self._reason = self._reason or reason

    def listen(self) -> None:
        """Takes the signals; call from the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def release(self) -> None:
        """Gives the signals back to their defaults: from here on they end the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            signal.default_int_handler(number, frame)
        self.ask(signal.Signals(number).name)


def watch_launcher(stop: StopRequest, pids: Sequence[int], *, poll_s: float = 0.5) -> None:
    """Asks for a stop as soon as one of the launcher's processes is gone."""
    if not pids:
        return

    def watch() -> None:
        pause = threading.Event()
        while all(_alive(pid) for pid in pids):
            pause.wait(poll_s)
        stop.ask("the launcher died")

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    # A zombie is dead, only not yet reaped by its parent.
    return fields[0] != "Z"
