"""Gated RMSNorm in PyTorch's own operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.precision import autocast_disabled


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, output_dtype: torch.dtype
) -> Tensor:
    """Normed (..., D) in `output_dtype`.

    Arguments and shapes are those of `mamba_dist.ops.gated_rms_norm.gated_rms_norm`.
    """
    with autocast_disabled(x):
        gated = x.to(weight.dtype) * F.silu(z.to(weight.dtype))
        grouped = gated.view(*gated.shape[:-1], groups, -1)
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=eps).flatten(-2)
        return (normed * weight).to(output_dtype)
