"""State space duality scan, the core of Mamba-2 (arXiv 2405.21060, sections 3 and 6).

B batch, L length, H heads, P headdim, N d_state, G groups; head h uses group h // (H / G).
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
from mamba_dist.ops.kept_scan import KeptScan, refuse_final_state
from mamba_dist.ops.scan_options import scan_options
from mamba_dist.ops.ssd import cpu, cuda, gpu, reference, torch_chunked

_IMPLEMENTATIONS: Final = MappingProxyType(
    {
        "reference": reference.ssd,
        "torch": torch_chunked.ssd,
        "cpu": cpu.ssd,
        "gpu": gpu.ssd,
        "cuda": cuda.ssd,
    }
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    *,
    chunk_size: int = 256,
    kept: KeptScan | None = None,
    grads_into: gpu.GradientParts = gpu.NO_PARTS,
    A_is_log: bool = False,
    donate_state: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Output y (B, L, H, P) in x's dtype, or (y, final_state) with final_state (B, H, P, N).

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T;  y_t = (h_t C_t + D x_t) silu(z_t), with
    dt = softplus(dt + dt_bias) where those are asked for. Everything is computed in fp32 (fp64 for
    fp64 x), under autocast too; the states are in that dtype. All floating inputs and the final
    state have gradients. Names and meaning follow mamba-ssm's `mamba_chunk_scan_combined`.

    Args:
        x: (B, L, H, P), input.
        dt: (B, L, H), step size before bias and softplus.
        A: (H,), not positive.
        B: (B, L, G, N), input matrix.
        C: (B, L, G, N), output matrix.
        D: (H,), skip connection.
        z: (B, L, H, P), gate.
        dt_bias: (H,), added to dt.
        dt_softplus: apply softplus to dt plus bias.
        seq_idx: (B, L) int32; the state is reset wherever it differs from the position before.
        initial_state: (B, H, P, N), the state before position 0, of each row's first document.
        return_final_state: also return the state after L - 1, of each row's last document.
        chunk_size: longest chunk in steps; a backend may take shorter ones for the same result.
        kept: spares a recomputation of this very call the scan: the first run fills it, later ones
            take y and the states from it, and no final state. Backends `reference`, `torch` and
            `cuda` scan again.
        grads_into: where the gradients of x, dt, B and C may be written, see `joint_gradient`;
            for backend `gpu`.
        A_is_log: A is the A_log that models learn, with A = -exp(A_log).
        donate_state: the initial state may be overwritten. Backend `gpu` does so for one step
            without gradients: the final state then is the tensor `initial_state` itself.
        backend: a name from `resolve_backend`.

    Raises:
        ValueError: a shape, dtype, the chunk size or the backend name is wrong, or a final state is
            wanted of `kept`.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state, chunk_size)
    refuse_final_state(kept, return_final_state)
    A, options = scan_options(
        backend,
        A,
        kept=kept,
        A_is_log=A_is_log,
        donate_state=donate_state,
        grads_into=grads_into,
    )
    y, final_state = implementation(_IMPLEMENTATIONS, backend)(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, chunk_size, **options
    )
    return (y, final_state) if return_final_state else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    check_rank("x", x, "B, L, H, P")
    check_rank("B", B, "B, L, G, N")
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    check_groups("head count", heads, groups)
    check_shape("dt", dt, batch, length, heads)
    check_shape("A", A, heads)
    check_shape("B", B, batch, length, groups, d_state)
    check_shape("C", C, batch, length, groups, d_state)
    check_shape("D", D, heads)
    check_shape("z", z, batch, length, heads, headdim)
    check_shape("dt_bias", dt_bias, heads)
    check_shape("initial_state", initial_state, batch, heads, headdim, d_state)
    check_seq_idx(seq_idx, x)
    check_floating(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state
    )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
