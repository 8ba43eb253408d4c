"""Mixer of Mamba-1: arXiv 2312.00752, section 3.4 and algorithm 2; names follow state-spaces/mamba.

B batch, L length, D d_model, E d_inner, N d_state, R dt_rank, K d_conv.
"""

import functools

import torch
from torch import Tensor, nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.layers import CausalConv1d, Linear, wide
from mamba_dist.model.recomputation import recomputed
from mamba_dist.model.state import LayerState, layer_state
from mamba_dist.ops.joint_gradient import GradientPart, split
from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.linear import linear
from mamba_dist.ops.selective_scan import selective_scan


class Mamba1Mixer(nn.Module):
    """Selective scan between two projections, gated by z."""

    def __init__(
        self, config: MambaConfig, *, backend: str, selective_recomputation: bool = False
    ) -> None:
        super().__init__()
        inner, d_state, rank = config.d_inner, config.d_state, config.resolved_dt_rank
        self._backend = backend
        self._selective_recomputation = selective_recomputation
        self._in_proj_widths = (inner, inner)
        self._x_proj_widths = (rank, d_state, d_state)
        self.in_proj = Linear(config.d_model, 2 * inner, bias=config.proj_bias, backend=backend)
        self.conv1d = CausalConv1d(
            inner, width=config.d_conv, bias=config.conv_bias, backend=backend
        )
        self.x_proj = Linear(inner, sum(self._x_proj_widths), bias=False, backend=backend)
        self.dt_proj = Linear(rank, inner, bias=True, backend=backend)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
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
        (x, z), grads_into = split(
            self.in_proj(hidden), self._in_proj_widths, backend=self._backend
        )
        scanned = functools.partial(
            self._scanned, seq_idx=seq_idx, state=state, grads_into=grads_into
        )
        if self._selective_recomputation and torch.is_grad_enabled() and not keep_state:
            y, new_state = recomputed(functools.partial(scanned, kept=KeptScan()), x, z)
        else:
            y, new_state = scanned(x, z, keep_state=keep_state, donate_state=donate_state)
        return self.out_proj(y), new_state

    def _scanned(
        self,
        x: Tensor,
        z: Tensor,
        *,
        seq_idx: Tensor | None,
        state: LayerState | None,
        grads_into: tuple[GradientPart | None, ...],
        keep_state: bool = False,
        donate_state: bool = False,
        kept: KeptScan | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Everything between the two projections, (B, L, E), and the state if it is to be kept."""
        grad_x_into, grad_z_into = grads_into
        x, conv_state = self.conv1d(
            x,
            seq_idx,
            None if state is None else state.conv,
            keep_state=keep_state,
            donate_state=donate_state,
            grad_x_into=grad_x_into,
        )
        dt, B, C = self.x_proj(x).split(self._x_proj_widths, dim=-1)
        result = selective_scan(
            x,
            # The bias is added inside the scan, in fp32: in bf16 it costs up to 1.6 % of dt.
            linear(dt, self.dt_proj.weight, backend=self._backend),
            wide(self.A_log),
            B.unsqueeze(2),
            C.unsqueeze(2),
            wide(self.D),
            z,
            wide(self.dt_proj.bias),
            True,
            seq_idx,
            None if state is None else state.ssm,
            keep_state,
            kept=kept,
            grad_z_into=grad_z_into,
            A_is_log=True,
            donate_state=donate_state,
            backend=self._backend,
        )
        y, ssm_state = result if isinstance(result, tuple) else (result, None)
        return y, layer_state(conv_state, ssm_state)
