"""How long work takes on a device: by CUDA events with a cold L2 cache, or by the wall clock."""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from mamba_dist.commands.bench.gpu.profile import timing_event

Part = Callable[[], object]
"""Work without a result of interest."""

# Twenty times an H100's L2 cache. Reading it takes a third of a millisecond.
_FLUSH_BYTES: Final = 1 << 30
_COPIES: Final = 7
# How often a measurement is repeated because the device had caught up with the host. The first one
# may compile its kernels, and its host time says nothing.
_ATTEMPTS: Final = 4
_LEAD_OVER_HOST: Final = 2.0
# Of a lead; work that takes the host longer waits for the device, which no lead can help.
_MAX_READS: Final = 100


class Clock(Protocol):
    """Times work on one device."""

    copy_bytes: int
    """Size of a copy that no cache of the device holds."""

    def seconds(self, *parts: Part) -> list[float]:
        """What each of `parts` takes, run in this order with nothing between them."""


class Mark(Protocol):
    """A `torch.cuda.Event`, as far as it is used here."""

    def record(self) -> None:
        """Queues it behind the work that the device was given."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> None:
        """Waits until the device has come to it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to another one."""


class EventClock:
    """Marks that a device reaches, after a lead that lets the host get ahead of it.

    The lead is device work that is queued first. As long as the device has not finished it when all
    parts are queued too, what lies between the marks is the parts and not their launches.

    Args:
        read: device work that fills the device's cache; a lead is some of it.
        mark: makes a mark.
        host_s: the host's clock.
    """

    copy_bytes = _FLUSH_BYTES

    def __init__(
        self,
        read: Part,
        mark: Callable[[], Mark],
        host_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read = read
        self._mark = mark
        self._host_s = host_s
        self._read_s = self._seconds_of_a_read()

    def seconds(self, *parts: Part) -> list[float]:
        """What each of `parts` takes on the device, after reads that fill its cache.

        Reads and not writes, whose lines would have to go back to memory on somebody else's time.
        Parts run several times if the device catches up with the host, the lead being sized by the
        time that they took the host before. Work that waits for the device in its midst always has
        the device catch up; its time is that of the last attempt.
        """
        reads = 1
        for _ in range(_ATTEMPTS):
            marks, host_s, was_ahead = self._run(parts, reads)
            if was_ahead:
                break
            needed = math.ceil(_LEAD_OVER_HOST * host_s / self._read_s)
            reads = min(max(needed, 2 * reads), _MAX_READS)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]

    def _run(self, parts: tuple[Part, ...], reads: int) -> tuple[list[Mark], float, bool]:
        """The marks around the parts, the host's time for them, and whether it was ahead."""
        marks = [self._mark() for _ in range(len(parts) + 1)]
        for _ in range(reads):
            self._read()
        begun_s = self._host_s()
        marks[0].record()
        for part, done in zip(parts, marks[1:], strict=True):
            part()
            done.record()
        host_s = self._host_s() - begun_s
        was_ahead = not marks[0].query()
        marks[-1].synchronize()
        return marks, host_s, was_ahead

    def _seconds_of_a_read(self) -> float:
        # The first one loads its kernel.
        self._read()
        before, after = self._mark(), self._mark()
        before.record()
        self._read()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


class CudaClock(EventClock):
    """CUDA events on the current stream of the current device."""

    def __init__(self) -> None:
        flush = torch.ones(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        super().__init__(flush.sum, timing_event)


class WallClock:
    """The host's clock, for devices whose work is done when the call returns."""

    copy_bytes = 1 << 26

    def seconds(self, *parts: Part) -> list[float]:
        """What each of `parts` takes."""
        times = [time.perf_counter()]
        for part in parts:
            part()
            times.append(time.perf_counter())
        return [end - start for start, end in pairwise(times)]


def clock_of(device: torch.device) -> Clock:
    """The clock that suits the device."""
    return CudaClock() if device.type == "cuda" else WallClock()


def copy_bytes_per_s(clock: Clock, device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device's memory, the median of some.

    The bound for an op that does nothing but move its inputs and outputs.
    """
    source = torch.ones(clock.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    clock.seconds(copy)
    median_s = statistics.median(clock.seconds(copy)[0] for _ in range(_COPIES))
    return 2 * clock.copy_bytes / median_s
