"""Resolve which implementation of the ops a run uses: once, logged, no silent fallback."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeVar, get_args

from mamba_dist.errors import BackendError
from mamba_dist.ops import cuda_packages
from mamba_dist.ops.native import library
from mamba_dist.ops.nvrtc import kernel as nvrtc_kernel
from mamba_dist.ops.triton_package import import_triton_module

Backend = Literal["reference", "torch", "cpu", "gpu", "cuda"]

_Implementation = TypeVar("_Implementation")
_logger = logging.getLogger(__name__)

_KERNEL_SOURCES: Final = tuple(
    Path(__file__).parent / op / "cpu.cpp"
    for op in ("causal_conv1d", "cross_entropy", "rms_norm", "selective_scan", "ssd")
)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works here; `detail` describes it, or says why not and what to install."""

    name: Backend
    available: bool
    detail: str


def _require_kernels() -> None:
    missing = [source for source in _KERNEL_SOURCES if not source.is_file()]
    if missing:
        raise BackendError(
            f"ops backend 'cpu' lacks {', '.join(map(str, missing))}; reinstall mamba-dist, or use "
            "engine.ops_backend: torch"
        )
    library.build_kernels(_KERNEL_SOURCES)


def _require_gpu() -> None:
    nvrtc_kernel.require_device()
    import_triton_module()


@dataclass(frozen=True)
class _BackendRecord:
    description: str
    # Device type on which alone the backend runs; None is every device that torch knows.
    device_type: str | None = None
    # Makes the backend ready, or raises BackendError that says what to install.
    prepare: Callable[[], None] | None = None


_RECORDS: Final = MappingProxyType[Backend, _BackendRecord](
    {
        "reference": _BackendRecord("loop over time steps, slow, the truth for tests"),
        "torch": _BackendRecord("chunked, plain PyTorch"),
        "cpu": _BackendRecord("native kernels", "cpu", _require_kernels),
        "gpu": _BackendRecord(
            "our own kernels, compiled by NVRTC and Triton at their first use; unless "
            "training.deterministic the last bits of gradients vary from run to run",
            "cuda",
            _require_gpu,
        ),
        "cuda": _BackendRecord(
            "mamba-ssm and causal-conv1d, whose gradients vary in the last bits from run to run",
            "cuda",
            cuda_packages.require_packages,
        ),
    }
)
# `auto` takes the first one that works on the device: the fastest comes first.
_AUTO_ORDER: Final[tuple[Backend, ...]] = ("gpu", "cuda", "cpu", "torch")


def resolve_backend(requested: str, *, device_type: str, log: bool = True) -> Backend:
    """Name of the backend to hand to every op; `auto` becomes the fastest one on `device_type`.

    Logs the choice in one line; the line gives the reason if `auto` had to take a slower one.
    Compiles or imports what the backend needs. `device_type` is `torch.device.type`.

    Raises:
        BackendError: the backend is unknown, not for this device, or cannot work on this machine.
    """
    if requested == "auto":
        return _fastest(device_type, log=log)
    chosen = _known(requested)
    _prepare(chosen, device_type)
    if log:
        _log_choice(chosen, requested, device_type)
    return chosen


def describe_backends(device_type: str) -> list[BackendStatus]:
    """Every backend of this version, tried out on `device_type` as `resolve_backend` would."""
    return [_status(name, device_type) for name in _RECORDS]


def implementation(table: Mapping[str, _Implementation], backend: str) -> _Implementation:
    """The entry of one op's implementation table for a resolved backend name.

    Raises:
        ValueError: `backend` has no implementation here; `auto` has to be resolved first.
    """
    for name, function in table.items():
        if name == backend:
            return function
    raise ValueError(
        f"backend is {backend!r}, expected one of {', '.join(table)} (resolve_backend turns 'auto' "
        "into one of them)"
    )


def _fastest(device_type: str, *, log: bool) -> Backend:
    failures = []
    for name in _AUTO_ORDER:
        if not _runs_on(name, device_type):
            continue
        try:
            _prepare(name, device_type)
        except BackendError as error:
            # A compiler's log follows its first line; asked for by name, the backend shows it all.
            failures.append(str(error).partition("\n")[0])
        else:
            if log:
                _log_choice(name, "auto", device_type, instead_of=failures)
            return name
    raise BackendError(f"no ops backend runs on device type {device_type!r}")


def _known(requested: str) -> Backend:
    for name in get_args(Backend):
        if name == requested:
            return name  # type: ignore[no-any-return]
    raise BackendError(
        f"ops backend {requested!r} is unknown, expected one of auto, {', '.join(_RECORDS)}; "
        "use engine.ops_backend: auto or torch"
    )


def _prepare(name: Backend, device_type: str) -> None:
    record = _RECORDS[name]
    if not _runs_on(name, device_type):
        raise BackendError(
            f"ops backend {name!r} needs device type {record.device_type!r}, and this is "
            f"{device_type!r}; use engine.ops_backend: auto"
        )
    if record.prepare is not None:
        record.prepare()


def _runs_on(name: Backend, device_type: str) -> bool:
    return _RECORDS[name].device_type in (None, device_type)


def _status(name: Backend, device_type: str) -> BackendStatus:
    try:
        _prepare(name, device_type)
    except BackendError as error:
        return BackendStatus(name, available=False, detail=str(error))
    return BackendStatus(name, available=True, detail=_RECORDS[name].description)


def _log_choice(
    chosen: Backend, requested: str, device_type: str, *, instead_of: list[str] | None = None
) -> None:
    reasons = f", because {'; '.join(instead_of)}" if instead_of else ""
    # Not a warning: those are printed by every rank, and all ranks make the same choice.
    _logger.info(
        "ops backend: %s (%s), asked for %r on %s%s",
        chosen,
        _RECORDS[chosen].description,
        requested,
        device_type,
        reasons,
    )
