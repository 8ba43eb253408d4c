"""Truth for the selective scan: one loop over time, one equation of arXiv 2312.00752 per line.

B batch, L length, E channels (d_inner), N d_state, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import reset_mask
from mamba_dist.ops.precision import autocast_disabled, compute_dtype


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32 or fp64, by autograd ops.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`.
    """
    dtype = compute_dtype(u)
    per_group = u.shape[2] // B.shape[2]
    with autocast_disabled(u):
        x, step, decay_rate = u.to(dtype), delta.to(dtype), A.to(dtype)
        if delta_bias is not None:
            step = step + delta_bias.to(dtype)  # algorithm 2, line 4: Parameter + s_delta(x)
        if delta_softplus:
            step = F.softplus(step)  # algorithm 2, line 4: tau_delta
        B_channels = B.to(dtype).repeat_interleave(per_group, dim=2)  # (B, L, E, N)
        C_channels = C.to(dtype).repeat_interleave(per_group, dim=2)
        state = x.new_zeros(u.shape[0], *A.shape)
        if initial_state is not None:
            state = initial_state.to(dtype)
        resets = reset_mask(seq_idx)
        outputs = []
        # unbind, not indexing: the backward of L single selects would fill L tensors of full size.
        steps = zip(
            x.unbind(1), step.unbind(1), B_channels.unbind(1), C_channels.unbind(1), strict=True
        )
        for t, (u_t, delta_t, B_t, C_t) in enumerate(steps):
            if resets is not None:
                state = torch.where(resets[:, t, None, None], 0.0, state)
            A_bar = torch.exp(delta_t[..., None] * decay_rate)  # equation 4, zero-order hold of A
            B_bar_u = (delta_t * u_t)[
                ..., None
            ] * B_t  # the Euler step that Mamba's code takes for B
            state = A_bar * state + B_bar_u  # equation 2a
            outputs.append((C_t * state).sum(-1))  # equation 2b
        y = torch.stack(outputs, dim=1)
        if D is not None:
            y = y + D.to(dtype) * x  # skip connection, as in S4
        if z is not None:
            y = y * F.silu(z.to(dtype))  # section 3.4, gate of the block
        return y.to(u.dtype), state
