"""What a mixer carries from one window of a sequence to the next.

B batch, E d_inner, N d_state, H heads, P headdim, K d_conv, G groups.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerState:
    """State of one mixer after some tokens, fp32.

    conv: inputs of the last K-1 positions, (B, E, K-1) in Mamba-1, (B, E + 2GN, K-1) in Mamba-2.
    ssm: state of the recurrence, (B, E, N) in Mamba-1, (B, H, P, N) in Mamba-2.
    """

    conv: Tensor
    ssm: Tensor


def layer_state(conv: Tensor | None, ssm: Tensor | None) -> LayerState | None:
    """The pair, or None if the parts were not kept."""
    return None if conv is None or ssm is None else LayerState(conv, ssm)
