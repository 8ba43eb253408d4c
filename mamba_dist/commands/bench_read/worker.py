"""One process of `bench data-read`: `python -m mamba_dist.commands.bench_read.worker JOB`, where
JOB is a `Job` as JSON. Prints lines of JSON: a `ColdOpen`; or, for a warm job, the sums, then for
each line of stdin a turn's windows per CPU-second, at random and in order, and at the end of stdin
the private bytes; or `absent`, why there is none.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mamba_dist.commands.bench_read import storage
from mamba_dist.commands.bench_read.spec import (
    ARROW,
    OURS,
    ColdOpen,
    Job,
    Reader,
    WindowReader,
)

_MODULES: Final = {OURS: "ours", ARROW: "peers_arrow"}
_FIRST_SHARE: Final = 0.37
_TIMED_TOGETHER: Final = 64
_NUMBERS: Final = _TIMED_TOGETHER * 10_000


def main(job: Job) -> None:
    """Prints what is asked for."""
    try:
        reader = _reader(job.variant)
    except ImportError as error:
        _tell({"absent": str(error)})
        return
    if job.task == "cold":
        _tell(asdict(_cold(reader, job)))
    else:
        _warm(reader, job)


def _reader(variant: str) -> Reader:
    name = _MODULES.get(variant, f"peers_{variant}")
    reader: Reader = importlib.import_module(f"{__package__}.{name}")
    return reader


def _cold(reader: Reader, job: Job) -> ColdOpen:
    files = job.files
    counted = not storage.has_holes(files)
    before = storage.cached_bytes(files) if counted else None
    storage_before, calls_before = storage.read_counters()
    begun_at = time.perf_counter()
    read = reader.open_windows(Path(job.folder))
    open_s = time.perf_counter() - begun_at
    read(int(_FIRST_SHARE * job.windows))
    first_s = time.perf_counter() - begun_at
    storage_after, calls_after = storage.read_counters()
    return ColdOpen(
        open_s=open_s,
        first_s=first_s,
        storage_bytes=storage_after - storage_before,
        call_bytes=calls_after - calls_before,
        cached_before_bytes=before,
        cached_bytes=storage.cached_bytes(files) if counted else None,
    )


def _warm(reader: Reader, job: Job) -> None:
    random = np.random.default_rng(0).integers(0, job.windows, _NUMBERS)
    in_order = np.arange(_NUMBERS) % job.windows
    private = storage.private_bytes()
    read = reader.open_windows(Path(job.folder))
    _tell({"sums": [int(read(number).sum()) for number in job.compared]})
    done = [0, 0]
    for _ in sys.stdin:
        speeds = []
        for which, numbers in enumerate((random, in_order)):
            count, seconds = _read_for(read, numbers, first=done[which], seconds=job.seconds)
            done[which] += count
            speeds.append(count / seconds)
        _tell({"random_per_s": speeds[0], "in_order_per_s": speeds[1]})
    _tell({"private_bytes": storage.private_bytes() - private})


def _read_for(
    read: WindowReader, numbers: npt.NDArray[np.int64], *, first: int, seconds: float
) -> tuple[int, float]:
    """How many windows were read in how many seconds of CPU time, which other processes do not
    lengthen; in blocks, so that the clock costs nothing; after the last number comes the first.
    """
    done = 0
    begun_at = now = time.process_time()
    while now - begun_at < seconds:
        at = (first + done) % len(numbers)
        for number in numbers[at : at + _TIMED_TOGETHER].tolist():
            read(number)
        done += _TIMED_TOGETHER
        now = time.process_time()
    return done, now - begun_at


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Job(**{**given, "compared": tuple(given["compared"])}))
    # The threads that some readers leave running would keep the process alive.
    os._exit(0)
