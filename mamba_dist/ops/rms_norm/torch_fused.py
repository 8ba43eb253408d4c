"""Residual add and RMSNorm in PyTorch's own operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.precision import autocast_disabled


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normed (..., D) in `output_dtype` and the stream in weight's dtype.

    Arguments and shapes are those of `mamba_dist.ops.rms_norm.add_rms_norm`.
    """
    with autocast_disabled(x):
        # Promotion widens x inside the addition, without a wide copy of it.
        stream = x.to(weight.dtype) if residual is None else residual + x
        return F.rms_norm(stream, weight.shape, weight, eps).to(output_dtype), stream
