"""Launches compiled CUDA kernels on torch's current stream, through the driver's own interface.

A kernel takes one argument, a struct `Call` by value, which Python fills as a ctypes structure.
"""

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from mamba_dist.errors import BackendError
from mamba_dist.ops.nvrtc.compiler import USE_TORCH, compiled

_MAX_SHARED_BYTES: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# What the hardware keeps of each block's shared memory, and in what steps it gives it.
_RESERVED_SHARED_BYTES: Final = 1024
_SHARED_UNIT: Final = 128
_INVALID_CONTEXT: Final = 201  # CUDA_ERROR_INVALID_CONTEXT
# Errors of running kernels, which come to light at whatever is launched next: illegal address,
# timeout, assertion, hardware stack, illegal instruction, misaligned address and so on.
_RUNNING_ERRORS: Final = frozenset((700, 702, 710, *range(714, 720)))
# bf16 conversions and matrix instructions; what is older goes through the torch backend.
OLDEST_CAPABILITY: Final = (8, 0)

_OneArgument = ctypes.c_void_p * 1


@dataclass(frozen=True)
class Kernel:
    """One entry point of a CUDA source, specialised by macros.

    threads: per block, THREADS in the source.
    blocks_per_sm: how many blocks registers have to be left for, BLOCKS_PER_SM in the source.
    spreads: no multiprocessor takes more than its even share of the blocks, see `launch`.
    """

    source: Path
    name: str
    macros: tuple[tuple[str, int | str], ...]
    threads: int
    blocks_per_sm: int = 1
    spreads: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's command line for it."""
        named = (*self.macros, ("THREADS", self.threads), ("BLOCKS_PER_SM", self.blocks_per_sm))
        return tuple(f"-D{name}={value}" for name, value in named)


@functools.cache
def specialised(
    source: Path,
    name: str,
    *,
    threads: int,
    blocks_per_sm: int = 1,
    spreads: bool = False,
    **macros: int,
) -> Kernel:
    """The one `Kernel` with these values: asked for at every call of an op, and made once."""
    named = tuple((macro, int(value)) for macro, value in macros.items())
    return Kernel(source, name, named, threads, blocks_per_sm, spreads)


_EMPTY: Final = Kernel(Path(__file__).with_name("empty.cu"), "empty", (), threads=32)


def call_fields(
    addresses: Iterable[str], numbers: Iterable[str], fractions: Iterable[str] = ()
) -> list[tuple[str, Any]]:
    """`_fields_` of a ctypes structure: pointers, then 64-bit integers, then 32-bit floats."""
    return [
        *((name, ctypes.c_void_p) for name in addresses),
        *((name, ctypes.c_int64) for name in numbers),
        *((name, ctypes.c_float) for name in fractions),
    ]


def launch(
    kernel: Kernel,
    call: ctypes.Structure,
    *,
    blocks: int,
    shared_bytes: int,
    device: torch.device,
) -> None:
    """Queues `blocks` blocks on the current stream of `device`; compiles at the first use.

    The caller keeps every tensor whose address is in `call` alive until the stream got that far,
    as torch's allocator does for tensors of the same stream.

    Left to itself the hardware fills some multiprocessors before others: 384 blocks of the scan,
    of which 4 fit, took 2.3 ms on an H100 of 132 multiprocessors, and 1.7 ms where 3 fit. A kernel
    that `spreads` asks for so much shared memory that no more than the even share fits. Not beside
    other ranks, for whose communication kernels there has to be room.

    Raises:
        BackendError: the tensors are not on a GPU, or the kernel cannot be compiled, loaded or
            launched.
    """
    if device.type != "cuda":
        raise BackendError(
            f"ops backend 'gpu' was given tensors on {device}; move them to the GPU, or {USE_TORCH}"
        )
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    if index != current:
        with torch.cuda.device(index):
            launch(kernel, call, blocks=blocks, shared_bytes=shared_bytes, device=device)
        return
    if kernel.spreads and not _has_other_ranks():
        shared_bytes = max(shared_bytes, _spreading_bytes(blocks, _multiprocessors(index)))
    arguments = _OneArgument(ctypes.addressof(call))
    # As torch.cuda.current_stream(index).cuda_stream, without making an object of it: 14 us less.
    stream = torch._C._cuda_getCurrentRawStream(index)
    function = _function(kernel, index)
    words = (function, blocks, 1, 1, kernel.threads, 1, 1, shared_bytes, stream, arguments, None)
    status = _driver().cuLaunchKernel(*words)
    if status == _INVALID_CONTEXT:
        _bind_context(index)
        status = _driver().cuLaunchKernel(*words)
    _check(status, f"launching {kernel.name} with {blocks} blocks")


@dataclass(frozen=True)
class _Multiprocessors:
    """Of one device; shared memory in bytes, of each of them and of a block at most."""

    count: int
    shared_bytes: int
    block_shared_bytes: int


@functools.cache
def _multiprocessors(device_index: int) -> _Multiprocessors:
    properties: Any = torch.cuda.get_device_properties(device_index)
    return _Multiprocessors(
        count=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_multiprocessor,
        block_shared_bytes=properties.shared_memory_per_block_optin,
    )


def _spreading_bytes(blocks: int, multiprocessors: _Multiprocessors) -> int:
    """Shared memory a block with which each multiprocessor takes its even share at most."""
    share = -(-blocks // multiprocessors.count)
    available = multiprocessors.shared_bytes // share - _RESERVED_SHARED_BYTES
    most = min(available, multiprocessors.block_shared_bytes)
    return max(0, most // _SHARED_UNIT * _SHARED_UNIT)


def _has_other_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def require_device() -> None:
    """Compiles a first kernel for the current device, an empty one.

    Raises:
        BackendError: there is no GPU, it is too old, or NVRTC is missing or cannot compile for it.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            f"ops backend 'gpu' needs a CUDA device, and torch has none; {USE_TORCH}"
        )
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        raise BackendError(
            f"ops backend 'gpu' needs compute capability {_dotted(OLDEST_CAPABILITY)} (Ampere) or "
            f"newer, and this device has {_dotted(capability)}; {USE_TORCH}"
        )
    compiled(_EMPTY.source, _EMPTY.options, capability)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernel.argtypes = [
        *(ctypes.c_void_p, *(ctypes.c_uint,) * 7),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    ]
    return library


@functools.cache
def _function(kernel: Kernel, device_index: int) -> ctypes.c_void_p:
    """The loaded kernel, with leave to use as much shared memory as a block can have."""
    _bind_context(device_index)
    capability = torch.cuda.get_device_capability(device_index)
    image = compiled(kernel.source, kernel.options, capability)
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    what = f"loading {kernel.name}"
    _check(driver.cuModuleLoadData(ctypes.byref(module), image), what)
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()), what)
    allowed = _multiprocessors(device_index).block_shared_bytes
    _check(
        driver.cuFuncSetAttribute(function, _MAX_SHARED_BYTES, ctypes.c_int(allowed)),
        f"giving {kernel.name} {allowed} bytes of shared memory",
    )
    return function


def _bind_context(device_index: int) -> None:
    """Makes torch's context the thread's own, which autograd's threads have not always done."""
    driver, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    what = f"binding CUDA device {device_index}"
    _check(driver.cuDeviceGet(ctypes.byref(device), device_index), what)
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), what)
    _check(driver.cuCtxSetCurrent(context), what)


def _check(status: int, doing: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown").decode()
        cause = ", of this or an earlier kernel" if status in _RUNNING_ERRORS else ""
        raise BackendError(
            f"{doing} failed: {reason} (CUDA driver status {status}{cause}); {USE_TORCH}"
        )
