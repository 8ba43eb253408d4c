"""The clocks of the GPU benchmarks: events behind a lead, tried out on a device that is made up."""

import time
from collections.abc import Callable

import pytest
import torch

from mamba_dist.commands.bench.gpu.clock import (
    CudaClock,
    EventClock,
    WallClock,
    copy_bytes_per_s,
)

CPU = torch.device("cpu")
READ_S = 300e-6


class Device:
    """A host that launches work and a device that does it later, both on a clock of their own."""

    def __init__(self) -> None:
        self.host_s = 0.0
        self.free_at_s = 0.0
        self.reads = 0

    def launch(self, *, host_s: float, device_s: float) -> None:
        self.host_s += host_s
        self.free_at_s = max(self.free_at_s, self.host_s) + device_s

    def read(self) -> None:
        self.reads += 1
        self.launch(host_s=5e-6, device_s=READ_S)

    def wait(self) -> None:
        self.host_s = max(self.host_s, self.free_at_s)

    def clock(self) -> EventClock:
        return EventClock(self.read, lambda: DeviceMark(self), lambda: self.host_s)


class DeviceMark:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = max(self._device.free_at_s, self._device.host_s)

    def query(self) -> bool:
        return self._device.host_s >= self._at_s

    def synchronize(self) -> None:
        self._device.host_s = max(self._device.host_s, self._at_s)

    def elapsed_time(self, end_event: "DeviceMark") -> float:
        return (end_event._at_s - self._at_s) * 1e3


def test_the_clock_times_short_work_and_not_its_slow_launch() -> None:
    device = Device()

    def part() -> None:
        # A host of 2 ms, of which the device sees nothing but 20 us.
        device.launch(host_s=1e-3, device_s=15e-6)
        device.launch(host_s=1e-3, device_s=5e-6)

    assert device.clock().seconds(part, part) == pytest.approx([20e-6, 20e-6])


def test_a_first_call_that_compiles_does_not_spoil_the_time() -> None:
    device, compiled = Device(), []

    def part() -> None:
        device.launch(host_s=1e-3 if compiled else 60.0, device_s=20e-6)
        compiled.append(True)

    clock = device.clock()
    device.reads = 0
    assert clock.seconds(part) == pytest.approx([20e-6])
    assert device.reads < 200, "a lead as long as the compilation"
    device.reads = 0
    clock.seconds(part)
    # One that proves too short, then twice the host's millisecond.
    assert device.reads == 1 + 7


def test_long_work_is_launched_once_behind_a_single_read() -> None:
    device, calls = Device(), []

    def part() -> None:
        calls.append(True)
        device.launch(host_s=50e-6, device_s=2e-3)

    clock = device.clock()
    device.reads = 0
    assert clock.seconds(part) == pytest.approx([2e-3])
    assert (len(calls), device.reads) == (1, 1)


def test_work_that_waits_for_the_device_ends_after_some_attempts() -> None:
    device, calls = Device(), []

    def part() -> None:
        calls.append(True)
        device.launch(host_s=10e-6, device_s=20e-6)
        device.wait()
        device.launch(host_s=10e-6, device_s=20e-6)

    assert device.clock().seconds(part) == pytest.approx([50e-6])
    assert len(calls) < 6
    assert device.host_s < 0.2


def test_a_copys_bandwidth_counts_what_is_read_and_what_is_written() -> None:
    class FixedClock(WallClock):
        copy_bytes = 1000

        def seconds(self, *parts: Callable[[], object]) -> list[float]:
            super().seconds(*parts)
            return [0.5 for _ in parts]

    assert copy_bytes_per_s(FixedClock(), CPU) == 4000


def test_the_wall_clock_times_each_part_for_itself() -> None:
    values = torch.randn(1 << 20)
    short, long = WallClock().seconds(lambda: None, lambda: values.sort())
    assert 0 <= short < long


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_events_time_the_work_and_not_its_launch() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    clock = CudaClock()
    clock.seconds(lambda: a @ a)
    one, ten = clock.seconds(lambda: a @ a, lambda: [a @ a for _ in range(10)])
    assert 5 < ten / one < 20
    assert 0 < copy_bytes_per_s(clock, a.device) < 2e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_short_kernel_behind_a_slow_host_takes_microseconds() -> None:
    a = torch.zeros(1024, device="cuda")

    def part() -> None:
        time.sleep(1e-3)
        a.add_(1)

    clock = CudaClock()
    clock.seconds(part)
    assert max(clock.seconds(part, part)) < 200e-6
