"""The residual stream's addition and RMSNorm (arXiv 1910.07467, equation 4) in one operation.

D width of the stream; the leading dimensions are any.
"""

from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.arguments import check_floating, check_shape
from mamba_dist.ops.backend import implementation
from mamba_dist.ops.rms_norm import cpu, gpu, reference, torch_fused

_IMPLEMENTATIONS: Final = MappingProxyType(
    {
        "reference": reference.add_rms_norm,
        "torch": torch_fused.add_rms_norm,
        "cpu": cpu.add_rms_norm,
        "gpu": gpu.add_rms_norm,
        "cuda": torch_fused.add_rms_norm,
    }
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    output_dtype: torch.dtype,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Normed (..., D) in `output_dtype`, and the new stream (..., D) in fp32.

    stream = residual + x; normed = stream / sqrt(mean(stream^2) + eps) * weight. Computed in fp32,
    or in fp64 if x or the residual is fp64, under autocast too; the stream is in that dtype. x,
    residual and weight have gradients, through both outputs.

    Args:
        x: (..., D), what a layer adds to the stream; the stream itself if `residual` is None.
        residual: (..., D), the stream before.
        weight: (D,).
        eps: added to the mean square.
        output_dtype: dtype of the normed output, that of the product that follows.
        backend: a name from `resolve_backend`.

    Raises:
        ValueError: a shape, dtype or the backend name is wrong.
    """
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected non-empty (..., D)")
    check_shape("residual", residual, *x.shape)
    check_shape("weight", weight, x.shape[-1])
    check_floating(x=x, residual=residual, weight=weight)
    if not output_dtype.is_floating_point:
        raise ValueError(f"output_dtype is {output_dtype}, expected a floating-point dtype")
    is_double = torch.float64 in (x.dtype, None if residual is None else residual.dtype)
    dtype = torch.float64 if is_double else torch.float32
    return implementation(_IMPLEMENTATIONS, backend)(
        x,
        None if residual is None else residual.to(dtype),
        weight.to(dtype),
        eps,
        output_dtype,
    )
