"""What only some backends of the scans can do, and what the others are given instead."""

from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.kept_scan import KeptScan

_KEEPING_BACKENDS: Final = ("cpu", "gpu")


def scan_options(
    backend: str, A: Tensor, *, kept: KeptScan | None, A_is_log: bool, **of_gpu: object
) -> tuple[Tensor, dict[str, object]]:
    """A as the backend takes it, and the keyword arguments that it has beside the common ones.

    `of_gpu` are those that backend `gpu` alone knows; none of them changes a result.
    """
    options: dict[str, object] = {"kept": kept} if backend in _KEEPING_BACKENDS else {}
    if backend == "gpu":
        # Its kernel for one step reads A_log.
        return A, options | {"A_is_log": A_is_log} | of_gpu
    return -torch.exp(A) if A_is_log else A, options
