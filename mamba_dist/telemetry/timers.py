"""Where a run's wall time and memory go."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds spent inside `with watch.running():`, summed until `reset`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time of its body."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started_at

    def reset(self) -> float:
        """The seconds so far; counting starts again from zero."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def peak_memory_gib() -> float:
    """Largest memory of this process so far: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30
