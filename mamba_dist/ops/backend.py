"""Resolve which implementation of the ops a run uses: once, logged, no silent fallback."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeVar, get_args

from mamba_dist.errors import BackendError

Backend = Literal["reference", "torch", "cpu"]

_Implementation = TypeVar("_Implementation")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _BackendRecord:
    description: str
    # Device types on which the backend runs; None is every device that torch knows.
    device_types: frozenset[str] | None = None


_AVAILABLE: Final = MappingProxyType[Backend, _BackendRecord](
    {
        "reference": _BackendRecord("loop over time steps, slow, the truth for tests"),
        "torch": _BackendRecord("chunked, plain PyTorch"),
        "cpu": _BackendRecord("native kernels", frozenset({"cpu"})),
    }
)
_PLANNED: Final = ("triton", "cuda")
# `auto` takes the first one that runs on the device: the fastest comes first.
_AUTO_ORDER: Final[tuple[Backend, ...]] = ("torch",)


def resolve_backend(requested: str, *, device_type: str) -> Backend:
    """Name of the backend to hand to every op; `auto` becomes the fastest one on `device_type`.

    Logs the choice (INFO), so call it once per run. `device_type` is `torch.device.type`.

    Raises:
        BackendError: the backend is unknown, not in this version, or not for this device.
    """
    chosen = _pick(requested, device_type)
    _logger.info(
        "ops backend: %s (%s), asked for %r on %s",
        chosen,
        _AVAILABLE[chosen].description,
        requested,
        device_type,
    )
    return chosen


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


def _pick(requested: str, device_type: str) -> Backend:
    if requested == "auto":
        candidates = [name for name in _AUTO_ORDER if _runs_on(name, device_type)]
        if candidates:
            return candidates[0]
        raise BackendError(f"no ops backend runs on device type {device_type!r}")
    if requested in _PLANNED:
        raise BackendError(
            f"ops backend {requested!r} is not available in this version; "
            "use engine.ops_backend: auto or torch"
        )
    for name in get_args(Backend):
        if name == requested:
            return _checked(name, device_type)
    raise BackendError(
        f"ops backend {requested!r} is unknown, expected one of auto, {', '.join(_AVAILABLE)}; "
        "use engine.ops_backend: auto or torch"
    )


def _checked(name: Backend, device_type: str) -> Backend:
    if _runs_on(name, device_type):
        return name
    raise BackendError(
        f"ops backend {name!r} does not run on device type {device_type!r}; "
        "use engine.ops_backend: auto"
    )


def _runs_on(name: Backend, device_type: str) -> bool:
    device_types = _AVAILABLE[name].device_types
    return device_types is None or device_type in device_types
