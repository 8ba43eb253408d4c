"""The parent's end of the processes that read."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.commands.bench_read import storage
from mamba_dist.commands.bench_read.spec import (
    ARROW,
    DATASETS,
    LITDATA,
    OURS,
    STREAMING,
    ColdOpen,
    Job,
    WarmTurns,
)

_PACKAGE: Final = __package__
_ONE_THREAD: Final = ("env", "OMP_NUM_THREADS=1")
_LAST_WORDS: Final = 3
_IMPORTED: Final = {
    OURS: "mamba_dist.data.dataset",
    ARROW: "pyarrow",
    DATASETS: "datasets",
    STREAMING: "streaming",
    LITDATA: "litdata",
}


def make_files(variant: str, *words: str) -> None:
    """Runs the maker of a variant's files.

    Raises:
        NotMeasuredError: it could not make them.
    """
    with _Process("maker", variant, *words) as process:
        process.hear()


def import_s(variant: str) -> float:
    """Seconds of a Python that imports what the variant's users import, and ends."""
    begun_at = time.perf_counter()
    command = [sys.executable, "-c", f"import {_IMPORTED.get(variant, 'numpy')}"]
    subprocess.run([*_ONE_THREAD, *command], capture_output=True, check=False)
    return time.perf_counter() - begun_at


def open_cold(job: Job) -> ColdOpen:
    """A first open in a process of its own.

    Raises:
        NotMeasuredError: the variant is absent or failed.
    """
    storage.drop_from_cache(job.files)
    with _Process("worker", json.dumps(asdict(job))) as process:
        return ColdOpen(**process.hear())


def warm_files(jobs: Iterable[Job]) -> None:
    """Brings the files of all jobs into the page cache, all alike: what a map faults in page by
    page lies there in small pieces, which cost a later reader ten times as many faults.
    """
    paths = sorted({path for job in jobs for path in job.files})
    if not storage.has_holes(paths):
        storage.drop_from_cache(paths)
        storage.read_through(paths)


class WarmReader:
    """A process that reads windows when told to. Close it.

    Raises:
        NotMeasuredError: the variant is absent or failed; so may each call.
    """

    def __init__(self, job: Job) -> None:
        self._process = _Process("worker", json.dumps(asdict(replace(job, task="warm"))))
        self._random: list[float] = []
        self._in_order: list[float] = []
        self._sums: Sequence[int] = ()

    def take_turn(self) -> None:
        """Reads for a while."""
        if not self._sums:
            self._sums = self._process.hear()["sums"]
        self._process.say("go on")
        told = self._process.hear()
        self._random.append(told["random_per_s"])
        self._in_order.append(told["in_order_per_s"])

    def finish(self) -> WarmTurns:
        """All turns."""
        self._process.say(None)
        private = self._process.hear()["private_bytes"]
        return WarmTurns(self._random, self._in_order, private, self._sums)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


class _Process:
    """One of our modules in a process that tells lines of JSON."""

    def __init__(self, module: str, *words: str) -> None:
        # Not a pipe: nobody reads it while the process works.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*_ONE_THREAD, sys.executable, "-m", f"{_PACKAGE}.{module}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, line: str | None) -> None:
        """Sends a line; None ends them."""
        assert self._process.stdin is not None
        try:
            if line is None:
                self._process.stdin.close()
            else:
                print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise NotMeasuredError(self._why_it_ended()) from error

    def hear(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                if "absent" in told:
                    raise NotMeasuredError(told["absent"])
                return told
        raise NotMeasuredError(self._why_it_ended())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        said = " / ".join([line.strip() for line in lines if line.strip()][-_LAST_WORDS:])
        return f"its process ended with {code}" + (f": {said}" if said else "")
