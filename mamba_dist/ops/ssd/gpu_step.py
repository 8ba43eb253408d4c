"""One step of the SSD recurrence, for decoding, by the kernel that both scans share.

B batch, H heads, P headdim, N d_state.
"""

from torch import Tensor

from mamba_dist.ops.nvrtc.state_step import StepInputs, state_step


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    **options: bool,
) -> tuple[Tensor, Tensor]:
    """Output y (B, 1, H, P) in x's dtype and the state after the step (B, H, P, N) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.ssd.ssd` with one position; `options` are
    those of `mamba_dist.ops.nvrtc.state_step.state_step`. A donated state comes back itself.

    Raises:
        BackendError: the kernel cannot be compiled or run here.
    """
    # (B, H P, N), a view of what is contiguous.
    before = None if initial_state is None else initial_state.flatten(1, 2)
    gate = None if z is None else z[:, 0].flatten(1)
    inputs = StepInputs(x[:, 0].flatten(1), dt[:, 0], A, B[:, 0], C[:, 0], D, gate, dt_bias, before)
    y, after = state_step(inputs, **options)
    if initial_state is not None and after.data_ptr() == initial_state.data_ptr():
        return y.view(x.shape), initial_state
    return y.view(x.shape), after.view(*x.shape[:1], *x.shape[2:], B.shape[3])
