"""The emulator of a GPU shows what is wrong with a kernel, whatever a lucky order would hide."""

import ctypes
from pathlib import Path

import pytest
import torch
from emulated_kernels import launch_emulated

from mamba_dist.ops.nvrtc.kernel import Kernel

THREADS = 128


class Call(ctypes.Structure):
    _fields_ = (("given", ctypes.c_void_p), ("taken", ctypes.c_void_p))


def is_right(fault: str) -> bool:
    """Runs the kernel that has the fault; whether it did what it should."""
    given = torch.arange(4.0 * THREADS).view(2, THREADS, 2)
    taken = torch.full_like(given, torch.nan)
    kernel = Kernel(
        source=Path(__file__).parent / "simt" / "faults.cu",
        name="faults",
        macros=(("FAULT", fault),),
        threads=THREADS,
    )
    call = Call(given.data_ptr(), taken.data_ptr())
    launch_emulated(kernel, call, blocks=1, shared_bytes=8 * THREADS, device=torch.device("cpu"))
    return torch.equal(taken, given.flip(1))


def test_a_kernel_without_a_fault_is_right() -> None:
    assert is_right("NONE")


@pytest.mark.parametrize("fault", ["NO_WAIT", "NO_BARRIER", "NO_BARRIER_AFTER"])
def test_a_race_makes_results_wrong(fault: str) -> None:
    assert not is_right(fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("MISALIGNED", r"line \d+: an access of 8 bytes at .* 4 modulo 8: .*= \*from;"),
        ("MISALIGNED_COPY", "a copy of 8 bytes .* 4 modulo 8"),
        ("ASTRAY", r"a write 0 bytes behind the 1024 of shared memory"),
        ("NOT_ALL_AT_BARRIER", "127 of 128 threads wait for others"),
    ],
)
def test_what_a_gpu_refuses_is_named(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"faults of faults\.cu with .*{message}"):
        is_right(fault)
