"""Truth for the residual add and RMSNorm: arXiv 1910.07467, equation 4, term by term."""

import torch
from torch import Tensor

from mamba_dist.ops.precision import autocast_disabled


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normed (..., D) in `output_dtype` and the stream in weight's dtype.

    Arguments and shapes are those of `mamba_dist.ops.rms_norm.add_rms_norm`.
    """
    with autocast_disabled(x):
        stream = x.to(weight.dtype)
        if residual is not None:
            stream = residual + stream
        mean_square = (stream * stream).mean(-1, keepdim=True)
        normed = stream / torch.sqrt(mean_square + eps) * weight
        return normed.to(output_dtype), stream
