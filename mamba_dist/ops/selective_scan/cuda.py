"""Selective scan by mamba-ssm's CUDA kernel, with what that lacks built from what it has.

It has channels first, no documents, no initial state, and no gradient for its last state.
- Documents: gap positions between them, see `gaps.py`.
- Initial state: N positions before the first, of which the n-th adds the state's n-th entry. Their
  step is so small that nothing decays, and their input so much larger.
- Gradient of the final state: N positions after the last, where nothing decays or enters, whose
  n-th output is the state's n-th entry. They are run in the backward only, if it comes to that.

The kernel's backward adds with atomics: its gradients differ in the last bits from run to run.

B batch, L length, E channels, N d_state, G groups.
"""

from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.cuda_packages import (
    USE_TORCH,
    by_rows,
    kernel_dtype,
    refuse_fp64,
    selective_scan_fn,
)
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.precision import autocast_disabled
from mamba_dist.ops.selective_scan import torch_chunked
from mamba_dist.ops.selective_scan.gaps import GAP_STEP, find_gaps

_MAX_STATE: Final = 256
# A power of two, so that a product with it or its inverse is exact; exp(A times it) is 1 for any A
# above -2^34, and a state times its inverse overflows only above 2^67.
_TINY_STEP: Final = 2.0**-60


class _Inputs(NamedTuple):
    """Per position u, delta, z (B, L, E) and B, C (B, L, G, N); A (E, N), D and bias (E,)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


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
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`. One step goes
    to the torch backend.

    Raises:
        BackendError: the kernel cannot be imported, or not do this; the message says what can.
    """
    refuse_fp64("selective_scan", u)
    (batch, length, channels), d_state = u.shape, A.shape[1]
    if length == 1:
        return torch_chunked.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, initial_state
        )
    if d_state > _MAX_STATE:
        raise BackendError(
            f"d_state is {d_state}, and mamba-ssm's selective scan has at most {_MAX_STATE}; "
            f"{USE_TORCH}"
        )
    longest = 2 * (length + d_state)  # a gap before each position, and both states
    # What the kernel keeps, 2 N numbers a channel for 2,048 positions, is less than one of these.
    widest = max(channels, B[0, 0].numel())

    def scan_rows(rows: slice) -> tuple[Tensor, Tensor]:
        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        inputs = _Inputs(u[rows], delta[rows], A.float(), B[rows], C[rows], D, part(z), delta_bias)
        return _scan(inputs, delta_softplus, part(seq_idx), part(initial_state))

    with autocast_disabled(u):
        y, final_state = by_rows(
            batch,
            row_elements=longest * widest,
            op="selective_scan",
            call=scan_rows,
        )
        return y.to(u.dtype), final_state


def _scan(
    inputs: _Inputs, softplus: bool, seq_idx: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, L, E) and the final state (B, E, N) of rows that one call may take."""
    length, groups = inputs.u.shape[1], inputs.B.shape[2]
    if initial_state is not None:
        inputs, softplus = _after_state(inputs, softplus, initial_state.float()), False
        if seq_idx is not None:  # the state belongs to the first document
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, initial_state.shape[2]), seq_idx], dim=1)
    dtype = kernel_dtype(inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z)
    gaps = None if seq_idx is None else find_gaps(seq_idx, inputs.A)

    def lay_out(values: Tensor, *, gap: float = 0.0) -> Tensor:
        values = values.to(dtype)
        return (values if gaps is None else gaps.insert(values, gap=gap)).mT.contiguous()

    def lay_out_groups(values: Tensor) -> Tensor:
        by_channel = lay_out(values.flatten(2))
        return by_channel.view(len(by_channel), groups, -1, by_channel.shape[2])

    y, final_state = _kernel(
        lay_out(inputs.u),
        lay_out(inputs.delta, gap=GAP_STEP),
        inputs.A,
        lay_out_groups(inputs.B),
        lay_out_groups(inputs.C),
        None if inputs.D is None else inputs.D.float().contiguous(),
        None if inputs.z is None else lay_out(inputs.z),
        None if inputs.delta_bias is None else inputs.delta_bias.float().contiguous(),
        softplus,
    )
    y = y.mT if gaps is None else gaps.remove(y.mT)
    return y if initial_state is None else y[:, -length:], final_state


def _after_state(inputs: _Inputs, softplus: bool, state: Tensor) -> _Inputs:
    """fp32 inputs with N positions in front, after which a scan from zero has reached `state`."""
    d_state = state.shape[2]

    def prepend(values: Tensor, front: Tensor) -> Tensor:
        front = front.expand(values.shape[0], d_state, *values.shape[2:])
        return torch.cat([front, values.float()], dim=1)

    zero = state.new_zeros(())
    one_entry_each = torch.eye(d_state, device=state.device)[:, None]  # (N, 1, N)
    steps = _steps(inputs.delta, inputs.delta_bias, softplus)
    return _Inputs(
        u=prepend(inputs.u, state.mT / _TINY_STEP),
        delta=prepend(steps, zero + _TINY_STEP),
        A=inputs.A,
        B=prepend(inputs.B, one_entry_each),
        C=prepend(inputs.C, zero),
        D=inputs.D,
        z=None if inputs.z is None else prepend(inputs.z, zero),
        delta_bias=None,
    )


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The steps that the recurrence takes, in fp32; `bias` broadcasts against `delta`."""
    steps = delta.float()
    if bias is not None:
        steps = steps + bias.float()
    return F.softplus(steps) if softplus else steps


def _kernel(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, E, L) and final state (B, E, N) fp32, both with gradients; B, C (B, G, N, L)."""
    y, last_state = selective_scan_fn()(
        u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state=True
    )
    final_state: Tensor = _FinalState.apply(  # type: ignore[no-untyped-call]
        last_state.detach(), u, delta, A, B, delta_bias, softplus
    )
    return y, final_state


class _FinalState(torch.autograd.Function):
    """The kernel's last state, with the gradient that the kernel leaves out.

    Keeps what the kernel keeps for its own backward, so it costs no memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        last_state: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        delta_bias: Tensor | None,
        softplus: bool,
    ) -> Tensor:
        ctx.save_for_backward(u, delta, A, B, delta_bias)
        ctx.softplus = softplus
        return last_state.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_state: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:6]
        with torch.enable_grad(), autocast_disabled(saved[0]):
            leaves: list[Any] = [
                None if tensor is None else tensor.detach().requires_grad_(want)
                for tensor, want in zip(saved, wanted, strict=True)
            ]
            state = _state_as_output(*leaves, softplus=ctx.softplus)
            asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
            gradients = iter(torch.autograd.grad(state, asked, grad_state))
        return None, *(next(gradients) if want else None for want in wanted), None


def _state_as_output(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, *, softplus: bool
) -> Tensor:
    """The state (B, E, N) after the last position, read off N further positions' outputs."""
    d_state = A.shape[1]
    bias = None if delta_bias is None else delta_bias[:, None]
    # A step of 0 decays nothing, and C = 0 keeps the real positions' outputs out of it.
    one_entry_each = torch.eye(d_state, device=u.device).expand(*B.shape[:2], -1, -1)
    C = torch.cat([B.new_zeros(B.shape, dtype=torch.float32), one_entry_each], dim=3)
    y = selective_scan_fn()(
        F.pad(u.float(), (0, d_state)),
        F.pad(_steps(delta, bias, softplus), (0, d_state)),
        A,
        F.pad(B.float(), (0, d_state)),
        C,
    )
    return y[..., -d_state:]  # type: ignore[no-any-return]
