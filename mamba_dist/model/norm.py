"""RMSNorm of the residual stream and the gated RMSNorm of Mamba-2, both computed in fp32.

B batch, L length, D width, G groups. RMSNorm: arXiv 1910.07467, equation 4; the gated one stands in
arXiv 2405.21060, section 7.1.
"""

import torch
from torch import Tensor, nn

from mamba_dist.ops.gated_rms_norm import gated_rms_norm
from mamba_dist.ops.joint_gradient import GradientPart
from mamba_dist.ops.rms_norm import add_rms_norm


class AddRMSNorm(nn.Module):
    """Adds a layer's output to the residual stream and norms the sum: stream / rms * weight."""

    def __init__(self, width: int, *, eps: float, backend: str) -> None:
        super().__init__()
        self.eps = eps
        self._backend = backend
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normed, in autocast's dtype if it is on, else in x's; and residual + x, fp32.

        x (..., D) is what a layer gave, or the stream itself if there is no `residual` (..., D).
        """
        return add_rms_norm(
            x,
            residual,
            self.weight,
            eps=self.eps,
            output_dtype=_output_dtype(x),
            backend=self._backend,
        )


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(z) (norm_before_gate False), each of G groups of channels by itself."""

    def __init__(self, width: int, *, groups: int, eps: float, backend: str) -> None:
        super().__init__()
        self.eps = eps
        self.groups = groups
        self._backend = backend
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def forward(self, x: Tensor, z: Tensor, *, grad_z_into: GradientPart | None = None) -> Tensor:
        """(..., D), in autocast's dtype if it is on, else in x's; x and z are (..., D)."""
        return gated_rms_norm(
            x,
            z,
            self.weight,
            groups=self.groups,
            grad_z_into=grad_z_into,
            eps=self.eps,
            output_dtype=_output_dtype(x),
            backend=self._backend,
        )


def _output_dtype(x: Tensor) -> torch.dtype:
    # The next matrix product would cast to this dtype anyway; doing it here saves a wider copy.
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
