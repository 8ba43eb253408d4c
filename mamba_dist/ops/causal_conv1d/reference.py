"""Truth for the causal convolution: one loop over time, one product per tap.

B batch, L length, E channels, K kernel width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import reset_mask
from mamba_dist.ops.precision import autocast_disabled, compute_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, L, E) in x's dtype and, if asked for, final state (B, E, K - 1) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.causal_conv1d.causal_conv1d`.
    """
    dtype = compute_dtype(x)
    batch, _, channels = x.shape
    with autocast_disabled(x):
        taps = weight.to(dtype)
        state = taps.new_zeros(batch, channels, taps.shape[1] - 1)
        if initial_state is not None:
            state = initial_state.to(dtype)
        resets = reset_mask(seq_idx)
        outputs = []
        for t, x_t in enumerate(x.to(dtype).unbind(1)):
            if resets is not None:
                state = torch.where(resets[:, t, None, None], 0.0, state)
            window = torch.cat([state, x_t[..., None]], dim=-1)  # (B, E, K), the last K inputs
            outputs.append((window * taps).sum(-1))  # y_t = sum_k w_k x_(t - K + 1 + k)
            state = window[..., 1:]
        y = torch.stack(outputs, dim=1)
        if bias is not None:
            y = y + bias.to(dtype)
        if silu:
            y = F.silu(y)  # arXiv 2312.00752, section 3.4
        return y.to(x.dtype), state if return_final_state else None
