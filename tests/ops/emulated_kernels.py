"""The CUDA kernels' sources compiled for the CPU, called on CPU tensors in place of a GPU's."""

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mamba_dist.ops.nvrtc import compiler
from mamba_dist.ops.nvrtc.kernel import Kernel

SEED = 1
"""Of the order in which every launch runs its blocks, warps and lanes: the same at each run."""

_EMULATOR = Path(__file__).parent / "simt" / "emulator.h"
# Compiling takes longer than running, so it does not optimise. Without FORTIFY, which takes a jump
# between fibres for a broken stack.
_COMPILE = (
    *("g++", "-std=c++17", "-O0", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
    "-fsanitize=alignment",
)


def launch_emulated(
    kernel: Kernel, call: ctypes.Structure, *, blocks: int, shared_bytes: int, device: torch.device
) -> None:
    """Runs a kernel to its end; takes what `mamba_dist.ops.nvrtc.kernel.launch` takes.

    Raises:
        AssertionError: a thread did what a GPU forbids; see the emulator's header.
    """
    assert device.type == "cpu"
    assert kernel.threads % 32 == 0
    run, text = _built(kernel)
    problem = run(ctypes.byref(call), blocks, kernel.threads, shared_bytes, SEED).decode()
    line = re.match(r"line (\d+)", problem)
    if line:
        problem += f": {text.splitlines()[int(line[1]) - 1].strip()}"
    assert not problem, f"{kernel.name} of {kernel.source.name} with {kernel.options}: {problem}"


@functools.cache
def _built(kernel: Kernel) -> tuple[Callable[..., Any], str]:
    """The kernel's function and its text, whose lines the function names."""
    text = compiler._inlined(kernel.source)
    with tempfile.TemporaryDirectory(prefix="emulated-") as name:
        source, compiled, library = (Path(name, f"kernel.{end}") for end in ("cpp", "o", "so"))
        source.write_text(text)
        emulator = ("-include", str(_precompiled_emulator()))
        _run(*_COMPILE, *kernel.options, *emulator, "-c", str(source), "-o", str(compiled))
        # By itself, since with its flag the sanitizer's library would be linked.
        _run("g++", "-shared", str(compiled), "-o", str(library))
        run = getattr(ctypes.CDLL(str(library)), kernel.name)
    run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    run.restype = ctypes.c_char_p
    return run, text


@functools.cache
def _precompiled_emulator() -> Path:
    """A copy of the emulator's header that the compiler need not read again for each kernel."""
    folder = tempfile.mkdtemp(prefix="emulator-")
    atexit.register(shutil.rmtree, folder)
    header = Path(shutil.copy(_EMULATOR, folder))
    _run(*_COMPILE, "-x", "c++-header", str(header), "-o", f"{header}.gch")
    return header


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
