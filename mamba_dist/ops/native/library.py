"""Compiles the C++ kernels once per machine and instruction set, and loads them through ctypes.

Plain C++ without torch's headers: a library builds in seconds and serves every version of torch.
Each process compiles into a file of its own and renames it, so a kill leaves nothing half-written
and no lock; the worst case is that two processes compile the same source at the same time.

The kernels use the OpenMP runtime that torch has loaded: a second one would bring a second pool of
threads, which spin against the first.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal

import platformdirs
import torch

from mamba_dist.errors import BackendError

InstructionSet = Literal["avx512", "avx2", "portable"]

_logger = logging.getLogger(__name__)

_INCLUDES: Final = Path(__file__).parent
_COMPILERS: Final = ("g++", "c++", "clang++")
_COMMON_FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    # Neither flag changes a result; without them loops with sqrt or select stay scalar.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
_FLAGS: Final[dict[InstructionSet, tuple[str, ...]]] = {
    # GCC prefers 256 bits by itself; on CPUs with AVX-512 that costs up to half the speed here.
    "avx512": (
        "-DVECTOR_BYTES=64",
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ),
    # Vectors wider than the machine's are 11 times slower, not just useless.
    "avx2": ("-DVECTOR_BYTES=32", "-mavx2", "-mfma"),
    "portable": ("-DVECTOR_BYTES=16",),
}
# Of a 64-bit ELF file: where its table of sections starts, the size of an entry, their number.
_ELF_HEADER: Final = struct.Struct("=40xQ10xHH")
_INSTALL: Final = (
    "install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "conda: conda install cxx-compiler)"
)


@functools.cache
def instruction_set() -> InstructionSet:
    """The widest one that both this machine and the kernels have.

    Follows torch, so its variable ATEN_CPU_CAPABILITY (avx512, avx2, default) lowers this as well.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "avx512"
    return "avx2" if capability == "AVX2" else "portable"


@functools.cache
def load_kernel(source: Path) -> ctypes.CDLL:
    """The library of one C++ source, compiled if this machine does not have it yet.

    Raises:
        BackendError: there is no compiler, compiling failed, or the cache cannot be written.
    """
    library = _library_path(source)
    try:
        if not library.exists():
            compile_kernel(source, library, _FLAGS[instruction_set()])
        _check_whole(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendError(
            f"the kernel library {library} cannot be loaded ({error}); delete it to have it built "
            "again, or use engine.ops_backend: torch"
        ) from error


def _check_whole(library: Path) -> None:
    """Raises OSError for a cut ELF file: the loader maps it, and its first call ends in SIGBUS."""
    with library.open("rb") as file:
        header = file.read(_ELF_HEADER.size)
    if header.startswith(b"\x7fELF") and len(header) == _ELF_HEADER.size:
        # The table of sections stands last.
        start, entry_bytes, entries = _ELF_HEADER.unpack(header)
        if library.stat().st_size >= start + entry_bytes * entries:
            return
    elif header and not b"\x7fELF".startswith(header[:4]):
        return
    raise OSError("the file is cut short")


def build_kernels(sources: Sequence[Path]) -> None:
    """Compiles side by side what this machine does not have yet, and says so.

    Raises:
        BackendError: there is no compiler, compiling failed, or the cache cannot be written.
    """
    missing = [source.parent.name for source in sources if not _library_path(source).exists()]
    if missing:
        _compiler()
        _logger.info(
            "compiling kernels for %s, once on this machine: %s",
            instruction_set(),
            ", ".join(missing),
        )
    with ThreadPoolExecutor(max_workers=len(sources)) as pool:
        list(pool.map(load_kernel, sources))


def cache_folder() -> Path:
    """Where the compiled kernels of this user lie."""
    return platformdirs.user_cache_path("mamba_dist") / "kernels"


def compile_kernel(source: Path, library: Path, flags: Sequence[str]) -> None:
    """Writes `library` whole or not at all.

    Raises:
        BackendError: there is no compiler, compiling failed, or the folder cannot be written.
    """
    compiler = _compiler()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
            built = Path(folder) / library.name
            _compile(compiler, source, built, flags)
            os.replace(built, library)
    except OSError as error:
        raise BackendError(
            f"the kernels' folder {library.parent} cannot be written ({error}); make it writable, "
            "or use engine.ops_backend: torch"
        ) from error


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise BackendError(
            f"ops backend 'cpu' needs a C++ compiler, and none of {', '.join(_COMPILERS)} is on "
            f"PATH; {_INSTALL}, or use engine.ops_backend: torch"
        )
    return found


def _compile(compiler: str, source: Path, library: Path, flags: Sequence[str]) -> None:
    compiled = library.with_suffix(".o")
    for command in (
        [compiler, *_COMMON_FLAGS, *flags, "-I", str(_INCLUDES), "-c", str(source)],
        # Without -fopenmp, which would link a runtime of its own beside torch's.
        [compiler, "-shared", str(compiled), *(f for f in flags if f.startswith("-fsanitize"))],
    ):
        output = compiled if "-c" in command else library
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            raise BackendError(
                f"{compiler} could not compile {source.name} of {source.parent.name} for the 'cpu' "
                f"backend:\n{done.stderr.strip()[:2000]}\nuse engine.ops_backend: torch, and "
                "report it"
            )


def _library_path(source: Path) -> Path:
    chosen = instruction_set()
    return cache_folder() / f"{source.parent.name}-{chosen}-{_fingerprint(source, chosen)}.so"


def _fingerprint(source: Path, chosen: InstructionSet) -> str:
    """Changes with whatever the library is made of."""
    digest = hashlib.sha256(repr((_COMMON_FLAGS, _FLAGS[chosen])).encode())
    for path in (source, *sorted(source.parent.glob("*.h")), *sorted(_INCLUDES.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
