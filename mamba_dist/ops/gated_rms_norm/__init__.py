"""Mamba-2's gated RMSNorm (arXiv 2405.21060, section 7.1) in one operation.

D channels, in G groups that are normed each by itself; the leading dimensions are any.
"""

from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.arguments import check_floating, check_shape
from mamba_dist.ops.backend import implementation
from mamba_dist.ops.gated_rms_norm import gpu, reference, torch_fused
from mamba_dist.ops.joint_gradient import GradientPart

_WRITING_BACKENDS: Final = ("gpu",)
_IMPLEMENTATIONS: Final = MappingProxyType(
    {
        "reference": reference.gated_rms_norm,
        "torch": torch_fused.gated_rms_norm,
        "cpu": torch_fused.gated_rms_norm,
        "gpu": gpu.gated_rms_norm,
        "cuda": torch_fused.gated_rms_norm,
    }
)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    groups: int,
    eps: float,
    output_dtype: torch.dtype,
    grad_z_into: GradientPart | None = None,
    backend: str = "torch",
) -> Tensor:
    """Normed (..., D) in `output_dtype`.

    v = x silu(z); normed = v / sqrt(mean of v^2 over its group + eps) * weight. Computed in fp32,
    or in fp64 if x or z is fp64, under autocast too. x, z and weight have gradients.

    Args:
        x: (..., D).
        z: (..., D), gate.
        weight: (D,).
        groups: G, of neighbouring channels.
        eps: added to the mean square.
        output_dtype: dtype of the output, that of the product that follows.
        grad_z_into: where z's gradient may be written, see `joint_gradient`; for backend `gpu`.
        backend: a name from `resolve_backend`.

    Raises:
        ValueError: a shape, dtype, the number of groups or the backend name is wrong.
    """
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected non-empty (..., D)")
    check_shape("z", z, *x.shape)
    check_shape("weight", weight, x.shape[-1])
    check_floating(x=x, z=z, weight=weight)
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} channels do not fall into {groups} groups")
    if not output_dtype.is_floating_point:
        raise ValueError(f"output_dtype is {output_dtype}, expected a floating-point dtype")
    dtype = torch.float64 if torch.float64 in (x.dtype, z.dtype) else torch.float32
    options = {"grad_z_into": grad_z_into} if backend in _WRITING_BACKENDS else {}
    return implementation(_IMPLEMENTATIONS, backend)(
        x, z, weight.to(dtype), groups, eps, output_dtype, **options
    )
