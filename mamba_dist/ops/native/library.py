"""Compiles the C++ kernels once per machine and instruction set, and loads them through ctypes.

Plain C++ without torch's headers: a library builds in seconds and serves every version of torch.
Processes take turns by a lock that dies with them, so the ranks of a node compile once. A library
is renamed into place and ends in its own digest: neither a kill nor a crash of the machine leaves
one that looks whole and is not.

The kernels use the OpenMP runtime that torch has loaded: a second one would bring a second pool of
threads, which spin against the first.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, Literal

import platformdirs
import torch

from mamba_dist.errors import BackendError

InstructionSet = Literal["avx512", "avx2", "portable"]

_logger = logging.getLogger(__name__)

_INCLUDES: Final = Path(__file__).parent
# GCC under either name: clang calls an OpenMP runtime that is not torch's.
_COMPILERS: Final = ("g++", "c++")
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
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_BUILDING: Final = ".building-"
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
    """The library of one C++ source, compiled if this machine does not have it whole.

    Raises:
        BackendError: there is no compiler, compiling failed, or the cache cannot be written.
    """
    library = _library_path(source)
    if not _is_whole(library):
        compile_kernel(source, library, _FLAGS[instruction_set()])
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendError(
            f"the kernel library {library} cannot be loaded ({error}); delete it to have it built "
            "again, or use engine.ops_backend: torch"
        ) from error


def checked_kernel(source: Path, **expected: int) -> ctypes.CDLL:
    """`load_kernel`, after asking its functions for numbers that Python repeats, as struct sizes.

    Raises:
        BackendError: as `load_kernel`.
    """
    library = load_kernel(source)
    for name, number in expected.items():
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        assert function() == number, f"{source.parent.name}: cpu.py and its C++ differ in {name}"
    return library


def _is_whole(library: Path) -> bool:
    """Whether it ends in the digest of the rest; a damaged library would crash when called."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unwritable(library.parent, error) from error
    return content[-_DIGEST_BYTES:] == _digest(content[:-_DIGEST_BYTES])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def build_kernels(sources: Sequence[Path]) -> None:
    """Compiles side by side what this machine does not have yet, and says so.

    Raises:
        BackendError: there is no compiler, compiling failed, or the cache cannot be written.
    """
    missing = [source.parent.name for source in sources if not _is_whole(_library_path(source))]
    if missing:
        _compiler()
        _logger.info(
            "compiling kernels for %s, once on this machine: %s",
            instruction_set(),
            ", ".join(missing),
        )
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        list(pool.map(load_kernel, sources))


def cache_folder() -> Path:
    """Where the compiled kernels of this user lie.

    Raises:
        BackendError: the user has no home directory.
    """
    try:
        return platformdirs.user_cache_path("mamba_dist") / "kernels"
    except RuntimeError as error:
        raise BackendError(
            f"there is no folder for compiled kernels ({error}); set HOME or XDG_CACHE_HOME, or "
            "use engine.ops_backend: torch"
        ) from error


def compile_kernel(source: Path, library: Path, flags: Sequence[str]) -> None:
    """Writes `library` whole or not at all, unless another process has just done so.

    Raises:
        BackendError: there is no compiler, compiling failed, or the folder cannot be written.
    """
    compiler = _compiler()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _alone(library):
            if _is_whole(library):
                return
            with tempfile.TemporaryDirectory(
                dir=library.parent, prefix=f"{_BUILDING}{library.stem}-"
            ) as folder:
                built = Path(folder) / library.name
                _compile(compiler, source, built, flags)
                with built.open("r+b") as file:
                    file.write(_digest(file.read()))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(built, library)
    except OSError as error:
        raise _unwritable(library.parent, error) from error


@contextmanager
def _alone(library: Path) -> Iterator[None]:
    """Holds the library's lock, which the kernel drops with its process; sweeps up after a kill."""
    with library.with_suffix(".lock").open("w") as lock:
        if _is_locked(lock):
            for left in library.parent.glob(f"{_BUILDING}{library.stem}-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Waits for the lock; false on a file system without locks, where each process may compile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _unwritable(folder: Path, error: OSError) -> BackendError:
    return BackendError(
        f"the kernels' folder {folder} cannot be used ({error}); make it writable, or use "
        "engine.ops_backend: torch"
    )


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
        said = _run_compiler([*command, "-o", str(output)])
        if said is not None or not output.exists():
            raise BackendError(
                f"{compiler} could not compile {source.name} of {source.parent.name} for the 'cpu' "
                f"backend:\n{said or 'it wrote nothing'}\nrepair the compiler or report this, and "
                "use engine.ops_backend: torch meanwhile"
            )


def _run_compiler(command: Sequence[str]) -> str | None:
    """What it has to complain of, None if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return (done.stderr.strip()[:2000] or f"exit {done.returncode}") if done.returncode else None


def _library_path(source: Path) -> Path:
    chosen = instruction_set()
    return cache_folder() / f"{source.parent.name}-{chosen}-{_fingerprint(source, chosen)}.so"


def _fingerprint(source: Path, chosen: InstructionSet) -> str:
    """Changes with whatever the library is made of."""
    # Homes are shared between machines: a library of a newer C library does not load elsewhere.
    made_with = (_COMMON_FLAGS, _FLAGS[chosen], platform.machine(), platform.libc_ver())
    digest = hashlib.sha256(repr(made_with).encode())
    for path in (source, *sorted(source.parent.glob("*.h")), *sorted(_INCLUDES.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
