"""Depthwise causal convolution before the scan (arXiv 2312.00752, figure 3), channels last.

B batch, L length, E channels, K kernel width (d_conv).
"""

from types import MappingProxyType
from typing import Final, Literal

from torch import Tensor

from mamba_dist.ops.arguments import check_floating, check_rank, check_seq_idx, check_shape
from mamba_dist.ops.backend import implementation
from mamba_dist.ops.causal_conv1d import cpu, cuda, gpu, reference, torch_chunked
from mamba_dist.ops.joint_gradient import GradientPart

_IMPLEMENTATIONS: Final = MappingProxyType(
    {
        "reference": reference.causal_conv1d,
        "torch": torch_chunked.causal_conv1d,
        "cpu": cpu.causal_conv1d,
        "gpu": gpu.causal_conv1d,
        "cuda": cuda.causal_conv1d,
    }
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: Literal["silu"] | None = None,
    *,
    grad_x_into: GradientPart | None = None,
    donate_state: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Output (B, L, E) in x's dtype, or (output, final_state) with final_state (B, E, K - 1).

    y_t = activation(bias + sum_k weight[:, k] x_(t - K + 1 + k)), where inputs of another document
    and inputs before the initial state are zero. Computed in fp32 (fp64 for fp64 x), under autocast
    too; the states are in that dtype. All floating inputs and the final state have gradients. Names
    and meaning follow `causal_conv1d_fn` of the causal-conv1d package, which has channels first.

    Args:
        x: (B, L, E), input.
        weight: (E, K), the last column meets the current input.
        bias: (E,).
        seq_idx: (B, L) int32; a document starts wherever it differs from the position before.
        initial_state: (B, E, K - 1), the inputs before position 0, oldest first, of each row's
            first document.
        return_final_state: also return the last K - 1 inputs, oldest first; those of earlier
            documents are zero.
        activation: None or "silu".
        grad_x_into: where x's gradient may be written, see `joint_gradient`; for backend `gpu`.
        donate_state: the initial state may be overwritten. Backend `gpu` does so for one step
            without gradients: the final state then is the tensor `initial_state` itself.
        backend: a name from `resolve_backend`.

    Raises:
        ValueError: a shape, dtype, the activation or the backend name is wrong.
    """
    check_rank("x", x, "B, L, E")
    check_rank("weight", weight, "E, K")
    batch, _, channels = x.shape
    width = weight.shape[1]
    check_shape("weight", weight, channels, width)
    check_shape("bias", bias, channels)
    check_shape("initial_state", initial_state, batch, channels, width - 1)
    check_seq_idx(seq_idx, x)
    check_floating(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}, expected None or 'silu'")
    options: dict[str, object] = {}
    if backend == "gpu":
        options = {"grad_x_into": grad_x_into, "donate_state": donate_state}
    y, final_state = implementation(_IMPLEMENTATIONS, backend)(
        x, weight, bias, seq_idx, initial_state, return_final_state, activation == "silu", **options
    )
    if final_state is None:
        return y
    return y, final_state
