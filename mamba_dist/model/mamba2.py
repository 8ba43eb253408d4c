"""Mixer of Mamba-2: arXiv 2405.21060, section 7.1 (parallel projections); upstream's names.

B batch, L length, D d_model, E d_inner, N d_state, H heads, P headdim, G groups, K d_conv.
"""

import functools

import torch
from torch import Tensor, nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.layers import CausalConv1d, Linear, wide
from mamba_dist.model.norm import GatedRMSNorm
from mamba_dist.model.recomputation import recomputed
from mamba_dist.model.state import LayerState, layer_state
from mamba_dist.ops.joint_gradient import GradientPart, split
from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.ssd import ssd


class Mamba2Mixer(nn.Module):
    """SSD between two projections, with a gated RMSNorm before the second."""

    def __init__(
        self, config: MambaConfig, *, backend: str, selective_recomputation: bool = False
    ) -> None:
        super().__init__()
        inner, heads, groups = config.d_inner, config.n_heads, config.ngroups
        shared = groups * config.d_state
        self._backend = backend
        self._selective_recomputation = selective_recomputation
        self._headdim, self._groups, self._chunk_size = config.headdim, groups, config.chunk_size
        self._in_proj_widths = (inner, inner + 2 * shared, heads)
        self._conv_widths = (inner, shared, shared)
        self.in_proj = Linear(
            config.d_model,
            sum(self._in_proj_widths),
            bias=config.proj_bias,
            backend=backend,
        )
        self.conv1d = CausalConv1d(
            sum(self._conv_widths), width=config.d_conv, bias=config.conv_bias, backend=backend
        )
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(inner, groups=groups, eps=config.norm_eps, backend=backend)
        self.out_proj = Linear(inner, config.d_model, bias=config.proj_bias, backend=backend)

    def forward(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
        *,
        keep_state: bool = False,
        donate_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """(B, L, D), and the state after position L-1 if it is to be kept.

        Args:
            hidden: (B, L, D).
            seq_idx: (B, L) int32; a document starts wherever it changes.
            state: what an earlier window left behind, for the first document of each row.
            keep_state: also return the state.
            donate_state: `state` may be overwritten by the new one.
        """
        (z, xBC, dt), (grad_z_into, *grads_into) = split(
            self.in_proj(hidden), self._in_proj_widths, backend=self._backend
        )
        scanned = functools.partial(
            self._scanned, seq_idx=seq_idx, state=state, grads_into=grads_into
        )
        if self._selective_recomputation and torch.is_grad_enabled() and not keep_state:
            y, new_state = recomputed(functools.partial(scanned, kept=KeptScan()), xBC, dt)
        else:
            y, new_state = scanned(xBC, dt, keep_state=keep_state, donate_state=donate_state)
        return self.out_proj(self.norm(y, z, grad_z_into=grad_z_into)), new_state

    def _scanned(
        self,
        xBC: Tensor,
        dt: Tensor,
        *,
        seq_idx: Tensor | None,
        state: LayerState | None,
        grads_into: list[GradientPart | None],
        keep_state: bool = False,
        donate_state: bool = False,
        kept: KeptScan | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Convolution and scan, (B, L, E), and the state if it is to be kept."""
        grad_xBC_into, grad_dt_into = grads_into
        xBC, conv_state = self.conv1d(
            xBC,
            seq_idx,
            None if state is None else state.conv,
            keep_state=keep_state,
            donate_state=donate_state,
            grad_x_into=grad_xBC_into,
        )
        (x, B, C), (grad_x_into, grad_B_into, grad_C_into) = split(
            xBC, self._conv_widths, backend=self._backend
        )
        result = ssd(
            x.unflatten(-1, (-1, self._headdim)),  # type: ignore[no-untyped-call]
            dt,
            wide(self.A_log),
            B.unflatten(-1, (self._groups, -1)),  # type: ignore[no-untyped-call]
            C.unflatten(-1, (self._groups, -1)),  # type: ignore[no-untyped-call]
            wide(self.D),
            # The gate belongs to the norm, and the bias is added in fp32 inside the op.
            None,
            wide(self.dt_bias),
            True,
            seq_idx,
            None if state is None else state.ssm,
            keep_state,
            chunk_size=self._chunk_size,
            kept=kept,
            grads_into=(grad_x_into, grad_dt_into, grad_B_into, grad_C_into),
            A_is_log=True,
            donate_state=donate_state,
            backend=self._backend,
        )
        y, ssm_state = result if isinstance(result, tuple) else (result, None)
        return y.flatten(-2), layer_state(conv_state, ssm_state)
