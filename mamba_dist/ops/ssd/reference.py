"""Truth for the SSD scan: one loop over time, one equation of arXiv 2405.21060 per line.

B batch, L length, H heads, P headdim, N d_state, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import reset_mask
from mamba_dist.ops.precision import autocast_disabled, compute_dtype


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, H, P) in x's dtype and final state (B, H, P, N) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.ssd.ssd`; a loop has no use for `chunk_size`.
    """
    dtype = compute_dtype(x)
    batch, _, heads, headdim = x.shape
    per_group = heads // B.shape[2]
    with autocast_disabled(x):
        values, step, decay_rate = x.to(dtype), dt.to(dtype), A.to(dtype)
        if dt_bias is not None:
            step = step + dt_bias.to(dtype)  # section 7.1, the parameters of Mamba-1 kept
        if dt_softplus:
            step = F.softplus(step)
        B_heads = B.to(dtype).repeat_interleave(per_group, dim=2)  # (B, L, H, N), section 7.2
        C_heads = C.to(dtype).repeat_interleave(per_group, dim=2)
        state = values.new_zeros(batch, heads, headdim, B.shape[3])
        if initial_state is not None:
            state = initial_state.to(dtype)
        resets = reset_mask(seq_idx)
        outputs = []
        steps = zip(
            values.unbind(1), step.unbind(1), B_heads.unbind(1), C_heads.unbind(1), strict=True
        )
        for t, (x_t, dt_t, B_t, C_t) in enumerate(steps):
            if resets is not None:
                state = torch.where(resets[:, t, None, None, None], 0.0, state)
            a_t = torch.exp(dt_t * decay_rate)  # A_t = a_t I, section 2.2 with the zero-order hold
            inflow = (dt_t[..., None] * x_t)[..., None] * B_t[..., None, :]  # dt_t x_t B_t^T
            state = a_t[..., None, None] * state + inflow  # equation 2a
            outputs.append((state * C_t[..., None, :]).sum(-1))  # equation 2b
        y = torch.stack(outputs, dim=1)
        if D is not None:
            y = y + D.to(dtype)[:, None] * values  # skip connection
        if z is not None:
            y = y * F.silu(z.to(dtype))  # gate, as in mamba-ssm's kernel
        return y.to(x.dtype), state
