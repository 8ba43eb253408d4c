"""The parent's end of a worker process."""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Final

from mamba_dist.commands.bench.spec import Allocator, NotMeasuredError, Outcome, Spec

# glibc gives freed memory of this size back at once and faults it in again, page by page, at the
# next allocation: half of the time of code that makes large temporaries.
_MALLOC_BYTES: Final = 4 << 30
_TUNED: Final = {
    name: str(_MALLOC_BYTES)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
}
_LAST_WORDS: Final = 3


class ChildWorker:
    """A `Worker` in a process of its own, which keeps its environment otherwise."""

    def __init__(self, spec: Spec, *, threads: int, allocator: Allocator) -> None:
        self._variant = spec.variant
        # Not a pipe: nobody reads it while the worker computes.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*_environment(threads, allocator), sys.executable, "-m", _module()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._send((spec, threads))

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> float:
        return float(self._call("start"))

    def steps(self, count: int) -> list[float]:
        return [float(seconds) for seconds in self._call("steps", count)]

    def finish(self) -> Outcome:
        outcome = self._call("finish")
        assert isinstance(outcome, Outcome)
        return outcome

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _call(self, method: str, *arguments: object) -> Any:
        self._send((method, arguments))
        assert self._process.stdout is not None
        try:
            good, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise NotMeasuredError(self._why_it_died()) from error
        if not good:
            raise NotMeasuredError(value)
        return value

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise NotMeasuredError(self._why_it_died()) from error

    def _why_it_died(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        said = " / ".join([line.strip() for line in lines if line.strip()][-_LAST_WORDS:])
        return f"its process ended with {code}" + (f": {said}" if said else "")


def _environment(threads: int, allocator: Allocator) -> Sequence[str]:
    """The start of a command that sets variables and keeps the others."""
    chosen = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    unset = [part for name in _TUNED for part in ("-u", name)]
    if allocator == "tuned":
        chosen |= _TUNED
    return ["env", *unset, *(f"{name}={value}" for name, value in chosen.items())]


def _module() -> str:
    return f"{__package__}.worker"
