"""Linear map of the projections, from the matrix-product library that is fastest on the machine.

I input features, O output features.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Final

import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.backend import implementation
from mamba_dist.ops.linear import cpu, gpu

_IMPLEMENTATIONS: Final = MappingProxyType[str, Callable[..., Tensor]](
    {
        "reference": F.linear,
        "torch": F.linear,
        "cpu": cpu.linear,
        "gpu": gpu.linear,
        "cuda": F.linear,
    }
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """x @ weight^T + bias, (..., O), with all gradients; under autocast in its dtype.

    A CPU without bf16 instructions computes bf16 products in fp32 and rounds what comes out.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,).
        backend: a name from `resolve_backend`.

    Raises:
        RuntimeError: the shapes or dtypes don't fit, as in `torch.nn.functional.linear`.
        ValueError: the backend name is wrong.
    """
    return implementation(_IMPLEMENTATIONS, backend)(x, weight, bias)
