"""How long work takes on a device: by CUDA events with a cold L2 cache, or by the wall clock."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor

Part = Callable[[], object]
"""Work without a result of interest."""

# Twenty times an H100's L2 cache. Reading it takes a third of a millisecond, in which Python gets
# ahead of the device: what is timed after it is the kernels and not their launches.
_FLUSH_BYTES: Final = 1 << 30
_COPIES: Final = 7


class Clock(Protocol):
    """Times work on one device."""

    copy_bytes: int
    """Size of a copy that no cache of the device holds."""

    def seconds(self, *parts: Part) -> list[float]:
        """What each of `parts` takes, run in this order with nothing between them."""


class CudaClock:
    """CUDA events on the current stream of the current device."""

    copy_bytes = _FLUSH_BYTES

    def __init__(self) -> None:
        self._flush = torch.ones(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def seconds(self, *parts: Part) -> list[float]:
        """What each of `parts` takes on the device, after a read that fills the L2 cache.

        A read and not a write, whose lines would have to go back to memory on somebody else's time.
        """
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(len(parts) + 1)
        ]
        self._flush.sum()
        events[0].record()
        for part, done in zip(parts, events[1:], strict=True):
            part()
            done.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


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
