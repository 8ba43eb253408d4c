"""The CUDA kernels' sources compiled for the CPU, called on CPU tensors in place of a GPU's."""

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch

from mamba_dist.ops.nvrtc import compiler
from mamba_dist.ops.nvrtc.kernel import Kernel

_EMULATOR = Path(__file__).parent / "simt" / "emulator.h"


def launch_emulated(
    kernel: Kernel, call: ctypes.Structure, *, blocks: int, shared_bytes: int, device: torch.device
) -> None:
    """Runs a kernel to its end; takes what `mamba_dist.ops.nvrtc.kernel.launch` takes."""
    assert device.type == "cpu"
    run = getattr(_library(kernel.source, kernel.options), kernel.name)
    run(ctypes.byref(call), blocks, kernel.threads, ctypes.c_int64(shared_bytes))


@functools.cache
def _library(source: Path, options: tuple[str, ...]) -> ctypes.CDLL:
    name = hashlib.sha256(repr((source, options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.mkdtemp(prefix="emulated-"))
    text, built = folder / f"{name}.cpp", folder / f"{name}.so"
    text.write_text(compiler._inlined(source))
    # Without FORTIFY, which takes a jump between fibres for a broken stack.
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    subprocess.run(
        ["g++", *flags, *options, "-include", str(_EMULATOR), str(text), "-o", str(built)],
        check=True,
    )
    return ctypes.CDLL(str(built))
