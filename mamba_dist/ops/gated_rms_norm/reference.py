"""Truth for the gated RMSNorm: the gate, then arXiv 1910.07467, equation 4, term by term."""

import torch
from torch import Tensor

from mamba_dist.ops.precision import autocast_disabled


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, output_dtype: torch.dtype
) -> Tensor:
    """Normed (..., D) in `output_dtype`.

    Arguments and shapes are those of `mamba_dist.ops.gated_rms_norm.gated_rms_norm`.
    """
    with autocast_disabled(x):
        gate = z.to(weight.dtype)
        gated = x.to(weight.dtype) * gate * torch.sigmoid(gate)
        grouped = gated.reshape(*gated.shape[:-1], groups, -1)
        mean_square = (grouped * grouped).mean(-1, keepdim=True)
        normed = (grouped / torch.sqrt(mean_square + eps)).flatten(-2) * weight
        return normed.to(output_dtype)
