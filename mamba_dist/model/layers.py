"""The learned maps that mixers and the language model are made of.

Constructors only reserve memory: values come from `model/init.py` or from a checkpoint. So building
a model costs no random numbers, works on the meta device, and never touches values, which
DeepSpeed's `zero.Init` has already taken away when a constructor of an outer module runs.

B batch, L length, E channels, K d_conv.
"""

import torch
from torch import Tensor, nn

from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.joint_gradient import GradientPart
from mamba_dist.ops.linear import linear


class Linear(nn.Linear):
    """nn.Linear in fp32 whose constructor leaves the values unset."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, backend: str) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)
        self._backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) in autocast's dtype if it is on, else in the input's."""
        return linear(input, self.weight, self.bias, backend=self._backend)

    def reset_parameters(self) -> None:
        """Leaves the values alone, see the head of this file."""


class Embedding(nn.Embedding):
    """nn.Embedding in fp32 whose constructor leaves the values unset."""

    weight: nn.Parameter

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Leaves the values alone, see the head of this file."""


class CausalConv1d(nn.Module):
    """Depthwise causal convolution, then SiLU; weight (E, 1, K) as in nn.Conv1d, bias (E,)."""

    def __init__(self, channels: int, *, width: int, bias: bool, backend: str) -> None:
        super().__init__()
        self._backend = backend
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(channels, dtype=torch.float32)) if bias else None

    def forward(
        self,
        x: Tensor,
        seq_idx: Tensor | None,
        state: Tensor | None,
        *,
        keep_state: bool,
        grad_x_into: GradientPart | None = None,
        donate_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, E) in x's dtype, and the state (B, E, K-1) after position L-1 if to be kept.

        With `donate_state` the one before may be overwritten.
        """
        result = causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            seq_idx,
            state,
            keep_state,
            "silu",
            grad_x_into=grad_x_into,
            donate_state=donate_state,
            backend=self._backend,
        )
        return result if isinstance(result, tuple) else (result, None)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is fp64: the precision of norms, A, D and dt bias."""
    return x if x.dtype == torch.float64 else x.float()
