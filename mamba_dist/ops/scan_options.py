"""What only some backends of the scans can do, and what the others are given instead."""

from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.kept_scan import KeptScan

_KEEPING_BACKENDS: Final = ("cpu", "gpu")
# With kernels for one step, which read A_log and write over a state that they may have.
_STEPPING_BACKENDS: Final = ("gpu",)


def scan_options(
    backend: str, A: Tensor, *, kept: KeptScan | None, A_is_log: bool, donate_state: bool
) -> tuple[Tensor, dict[str, object]]:
    """A as the backend takes it, and the keyword arguments that it has beside the common ones."""
    options: dict[str, object] = {"kept": kept} if backend in _KEEPING_BACKENDS else {}
    if backend in _STEPPING_BACKENDS:
        return A, options | {"A_is_log": A_is_log, "donate_state": donate_state}
    return -torch.exp(A) if A_is_log else A, options
