"""Compiles CUDA kernels by NVRTC, the compiler that every CUDA build of torch brings along.

Users need no CUDA toolkit: the sources include nothing of it, and NVRTC is a library. What was
compiled is kept per user, named by all that it is made of, and carries its own digest.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import platformdirs
import torch

from mamba_dist.errors import BackendError

_logger = logging.getLogger(__name__)

_INCLUDES: Final = Path(__file__).parent
_FLAGS: Final = ("-std=c++17", "-default-device")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
USE_TORCH: Final = "use engine.ops_backend: torch"


def compiled(source: Path, options: Sequence[str], capability: tuple[int, int]) -> bytes:
    """The cubin of one CUDA source for one compute capability, from the user's cache if there.

    Raises:
        BackendError: NVRTC cannot be found, or does not compile the source.
    """
    flags = (*_FLAGS, *options, f"--gpu-architecture=sm_{capability[0]}{capability[1]}")
    text = _inlined(source)
    version = nvrtc_version()
    made_of = hashlib.sha256(repr((text, flags, version)).encode()).hexdigest()[:24]
    name = f"{source.parent.name}-{source.stem}-sm{capability[0]}{capability[1]}-{made_of}.cubin"
    cached = _cache_folder()
    image = None if cached is None else _read_whole(cached / name)
    if image is None:
        _logger.debug("compiling %s for sm_%d%d", source, *capability)
        image = _compile(source, text, flags)
        if cached is not None:
            _keep(cached / name, image)
    return image


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC in use.

    Raises:
        BackendError: it cannot be found.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _library() -> ctypes.CDLL:
    """NVRTC of the CUDA version that torch was built with."""
    version = torch.version.cuda
    if version is None:
        raise BackendError(
            f"ops backend 'gpu' needs a CUDA build of torch, and this is {torch.__version__}; "
            f"install torch for CUDA, or {USE_TORCH}"
        )
    major = version.split(".")[0]
    name = f"libnvrtc.so.{major}"
    # NVRTC asks for its builtins by name, and a wheel's does not look beside itself.
    for builtins in _in_wheels(f"libnvrtc-builtins.so.{major}*"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
    # torch has it loaded or on its own path.
    for place in (name, *_in_wheels(name)):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(place)
    wheel = "nvidia-cuda-nvrtc-cu12" if major == "12" else "nvidia-cuda-nvrtc"
    raise BackendError(
        f"ops backend 'gpu' needs {name}, which comes with torch's CUDA wheels, and it cannot be "
        f"loaded; pip install '{wheel}=={major}.*', or {USE_TORCH}"
    )


def _in_wheels(name: str) -> list[str]:
    """Libraries of NVIDIA's wheels, which lie beside torch's package, by a pattern."""
    folders = (Path(folder or ".") for folder in sys.path)
    return [str(found) for folder in folders for found in folder.glob(f"nvidia/*/lib/{name}")]


def _inlined(source: Path) -> str:
    """The source with our own headers in place of their includes, each once."""
    seen: set[Path] = set()

    def expand(path: Path) -> str:
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#pragma once"):
                continue
            if not line.startswith('#include "'):
                lines.append(line)
                continue
            name = line.split('"')[1]
            header = next(p for p in (path.parent / name, _INCLUDES / name) if p.is_file())
            if header not in seen:
                seen.add(header)
                lines.append(expand(header))
        return "\n".join(lines)

    return expand(source)


def _compile(source: Path, text: str, flags: Sequence[str]) -> bytes:
    nvrtc = _library()
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), source.name.encode(), 0, None, None
    )
    if status:
        raise BackendError(f"NVRTC refused {source.name} with status {status}; {USE_TORCH}")
    try:
        words = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if nvrtc.nvrtcCompileProgram(program, len(flags), words):
            raise BackendError(
                f"NVRTC {'.'.join(map(str, nvrtc_version()))} could not compile {source.name} of "
                f"{source.parent.name} with {' '.join(flags)}:\n{_log(nvrtc, program)[:4000]}\n"
                f"report this, and {USE_TORCH} meanwhile"
            )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, image)
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def _cache_folder() -> Path | None:
    try:
        folder = platformdirs.user_cache_path("mamba_dist") / "gpu-kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        _logger.info("GPU kernels are compiled at each start: there is no cache folder (%s)", error)
        return None
    return folder


def _read_whole(path: Path) -> bytes | None:
    """What was kept at `path`, None if that is absent or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    image, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return image if hashlib.sha256(image).digest() == digest else None


def _keep(path: Path, image: bytes) -> None:
    """Leaves `image` at `path` whole or not at all; several processes may do so at once."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            written = Path(folder, path.name)
            written.write_bytes(image + hashlib.sha256(image).digest())
            os.replace(written, path)
    except OSError as error:
        _logger.info("the GPU kernel %s is not kept (%s)", path.name, error)
