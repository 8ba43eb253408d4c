"""Selective scan, the core of Mamba-1 (arXiv 2312.00752, section 3, algorithm 2).

B batch, L length, E channels (d_inner), N d_state, G groups; channel e uses group e // (E / G).
"""

from types import MappingProxyType
from typing import Final

from torch import Tensor

from mamba_dist.ops.arguments import (
    check_floating,
    check_groups,
    check_rank,
    check_seq_idx,
    check_shape,
)
from mamba_dist.ops.backend import implementation
from mamba_dist.ops.joint_gradient import GradientPart
from mamba_dist.ops.kept_scan import KeptScan, refuse_final_state
from mamba_dist.ops.scan_options import scan_options
from mamba_dist.ops.selective_scan import cpu, cuda, gpu, reference, torch_chunked

_IMPLEMENTATIONS: Final = MappingProxyType(
    {
        "reference": reference.selective_scan,
        "torch": torch_chunked.selective_scan,
        "cpu": cpu.selective_scan,
        "gpu": gpu.selective_scan,
        "cuda": cuda.selective_scan,
    }
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    *,
    kept: KeptScan | None = None,
    grad_z_into: GradientPart | None = None,
    A_is_log: bool = False,
    donate_state: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Output y (B, L, E) in u's dtype, or (y, final_state) with final_state (B, E, N).

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t;  y_t = (C_t h_t + D u_t) silu(z_t), with
    delta_t = softplus(delta + delta_bias) where those are asked for. Everything is computed in fp32
    (fp64 for fp64 u), under autocast too; the states are in that dtype. All floating inputs and the
    final state have gradients. Names and meaning follow mamba-ssm's `selective_scan_fn`.

    Args:
        u: (B, L, E), input.
        delta: (B, L, E), step size before bias and softplus.
        A: (E, N), negative for a decaying state; any values are right.
        B: (B, L, G, N), input matrix.
        C: (B, L, G, N), output matrix.
        D: (E,), skip connection.
        z: (B, L, E), gate.
        delta_bias: (E,), added to delta.
        delta_softplus: apply softplus to delta plus bias.
        seq_idx: (B, L) int32; the state is reset wherever it differs from the position before.
        initial_state: (B, E, N), the state before position 0, of each row's first document.
        return_final_state: also return the state after L - 1, of each row's last document.
        kept: spares a recomputation of this very call the scan: the first run fills it, later ones
            take y and the states from it, and no final state. Backends `reference`, `torch` and
            `cuda` scan again.
        grad_z_into: where z's gradient may be written, see `joint_gradient`; for backend `gpu`.
        A_is_log: A is the A_log that models learn, with A = -exp(A_log).
        donate_state: the initial state may be overwritten. Backend `gpu` does so for one step
            without gradients: the final state then is the tensor `initial_state` itself.
        backend: a name from `resolve_backend`.

    Raises:
        ValueError: a shape, dtype or backend name is wrong, or a final state is wanted of `kept`.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state)
    refuse_final_state(kept, return_final_state)
    A, options = scan_options(
        backend,
        A,
        kept=kept,
        A_is_log=A_is_log,
        donate_state=donate_state,
        grad_z_into=grad_z_into,
    )
    y, final_state = implementation(_IMPLEMENTATIONS, backend)(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, initial_state, **options
    )
    return (y, final_state) if return_final_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    check_rank("u", u, "B, L, E")
    check_rank("A", A, "E, N")
    check_rank("B", B, "B, L, G, N")
    batch, length, channels = u.shape
    d_state, groups = A.shape[1], B.shape[2]
    check_groups("channel count", channels, groups)
    check_shape("delta", delta, batch, length, channels)
    check_shape("A", A, channels, d_state)
    check_shape("B", B, batch, length, groups, d_state)
    check_shape("C", C, batch, length, groups, d_state)
    check_shape("D", D, channels)
    check_shape("z", z, batch, length, channels)
    check_shape("delta_bias", delta_bias, channels)
    check_shape("initial_state", initial_state, batch, channels, d_state)
    check_seq_idx(seq_idx, u)
    check_floating(
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
    )
