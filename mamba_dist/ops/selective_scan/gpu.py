"""Selective scan on our own CUDA kernels, compiled at the first use; see `gpu_tile.cuh`.

The kernels have 16 states per channel and whole warps of 16 channels. Other sizes are brought to
that here, in operations that autograd sees: channels are padded with zeros, and more states are
scanned 16 at a time, since the output is a sum over states. A step of decoding has its own kernel.

B batch, L length, E channels, N d_state, G groups.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.cuda_packages import document_numbers
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.joint_gradient import GradientPart, empty_gradient
from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.native.call import refuse_tangents
from mamba_dist.ops.nvrtc.compiler import USE_TORCH
from mamba_dist.ops.nvrtc.state_step import (
    MOST_STATES,
    StepInputs,
    is_plain_step,
    state_step,
)
from mamba_dist.ops.selective_scan.gpu_launch import (
    STATES,
    WARP_CHANNELS,
    ScanInputs,
    prepared,
    run_backward,
    run_forward,
)


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
    kept: KeptScan | None = None,
    grad_z_into: GradientPart | None = None,
    A_is_log: bool = False,
    donate_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`. bf16 and fp32
    are read as they are, anything else and mixtures through fp32. With
    `torch.use_deterministic_algorithms` dB and dC are added up in a fixed order, for which each
    64 channels need (B, L, 2 N) fp32 for a while; all else has a fixed order anyway.

    Raises:
        BackendError: u is fp64, or the kernels cannot be compiled or run here.
    """
    if u.dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no fp64 selective_scan; {USE_TORCH}")
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    refuse_tangents("selective_scan", *tensors)
    if A.shape[1] <= MOST_STATES and is_plain_step(u.shape[1], *tensors):
        gate = None if z is None else z[:, 0]
        rows = u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, gate, delta_bias, initial_state
        y, final_state = state_step(
            StepInputs(*rows), softplus=delta_softplus, A_is_log=A_is_log, donate_state=donate_state
        )
        return y[:, None], final_state
    options = delta_softplus, seq_idx, initial_state
    return _scanned(*tensors[:8], *options, kept, grad_z_into, A_is_log=A_is_log)


def _scanned(
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
    kept: KeptScan | None,
    grad_z_into: GradientPart | None,
    *,
    A_is_log: bool,
) -> tuple[Tensor, Tensor]:
    channels, d_state, groups = u.shape[2], A.shape[1], B.shape[2]
    if A_is_log:
        A = -torch.exp(A)
    rows = (u, delta, B, C) if z is None else (u, delta, B, C, z)
    storage = u.dtype if u.dtype == torch.bfloat16 else torch.float32
    if any(tensor.dtype != storage for tensor in rows):
        storage = torch.float32
    short = -(channels // groups) % WARP_CHANNELS
    parameters = {"D": D, "delta_bias": delta_bias}
    vectors = {
        name: u.new_zeros(channels, dtype=torch.float32) if tensor is None else tensor.float()
        for name, tensor in parameters.items()
    }
    inputs = ScanInputs(
        u=_widened(u.to(storage), groups, short),
        delta=_widened(delta.to(storage), groups, short),
        A=_widened(A.float().T, groups, short).T,
        B=B.to(storage),
        C=C.to(storage),
        D=_widened(vectors["D"], groups, short),
        z=None if z is None else _widened(z.to(storage), groups, short),
        delta_bias=_widened(vectors["delta_bias"], groups, short),
        initial_state=None
        if initial_state is None
        else _widened(initial_state.float().mT, groups, short).mT,
        seq_idx=_int32(seq_idx),
    )
    # With padding y is copied, and would be kept beside its copy.
    y, final_state = _all_states(
        inputs, delta_softplus, d_state, None if short else kept, grad_z_into
    )
    y = _narrowed(y, groups, short)
    return y.to(u.dtype), _narrowed(final_state.mT, groups, short).mT


def _int32(seq_idx: Tensor | None) -> Tensor | None:
    """The same documents; ids of 64 bits would not survive a cast."""
    if seq_idx is None or seq_idx.dtype == torch.int32:
        return seq_idx
    return document_numbers(seq_idx)


def _widened(values: Tensor, groups: int, more: int) -> Tensor:
    """(..., E) with `more` zeros after each group's channels."""
    if not more:
        return values
    by_group = values.reshape(*values.shape[:-1], groups, -1)
    return F.pad(by_group, (0, more)).flatten(-2)


def _narrowed(values: Tensor, groups: int, more: int) -> Tensor:
    if not more:
        return values
    return values.reshape(*values.shape[:-1], groups, -1)[..., :-more].flatten(-2)


def _all_states(
    inputs: ScanInputs,
    softplus: bool,
    d_state: int,
    kept: KeptScan | None,
    grad_z_into: GradientPart | None,
) -> tuple[Tensor, Tensor]:
    """y and final state (B, E, N) for any N."""
    if d_state == STATES:
        return _scan(inputs, softplus, kept, grad_z_into)
    missing = -d_state % STATES
    padded = inputs._replace(
        A=F.pad(inputs.A, (0, missing)),
        B=F.pad(inputs.B, (0, missing)),
        C=F.pad(inputs.C, (0, missing)),
        initial_state=None
        if inputs.initial_state is None
        else F.pad(inputs.initial_state, (0, missing)),
    )
    if d_state < STATES:
        y, final_state = _scan(padded, softplus, kept, grad_z_into)
        return y, final_state[..., :d_state]
    total, states = None, []
    for first in range(0, d_state, STATES):
        part = slice(first, first + STATES)
        # In fp32, as the sum over states is rounded only once; skip and gate come after it.
        y, final_state = _scan(
            padded._replace(
                u=inputs.u.float(),
                delta=inputs.delta.float(),
                A=padded.A[:, part],
                B=padded.B[..., part].float(),
                C=padded.C[..., part].float(),
                D=torch.zeros_like(inputs.D),
                z=None,
                initial_state=None
                if padded.initial_state is None
                else padded.initial_state[..., part],
            ),
            softplus,
            # More than y itself would be kept: one output for each part.
            None,
            None,
        )
        total = y if total is None else total + y
        states.append(final_state)
    assert total is not None
    total = total + inputs.D * inputs.u.float()
    if inputs.z is not None:
        total = total * F.silu(inputs.z.float())
    return total.to(inputs.u.dtype), torch.cat(states, dim=-1)[..., :d_state]


def _scan(
    inputs: ScanInputs,
    softplus: bool,
    kept: KeptScan | None,
    grad_z_into: GradientPart | None,
) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        # A Function cannot tell: it sees parameters that want a gradient even then.
        return run_forward(prepared(inputs), softplus, False)[:2]
    outputs: tuple[Tensor, Tensor] = _SelectiveScan.apply(  # type: ignore[no-untyped-call]
        softplus, kept, grad_z_into, *inputs
    )
    return outputs


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        softplus: bool,
        kept: KeptScan | None,
        grad_z_into: GradientPart | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = prepared(ScanInputs(*tensors))  # type: ignore[arg-type]
        keep_states = any(ctx.needs_input_grad)
        run = functools.partial(run_forward, inputs, softplus, keep_states)
        results = kept.results(run) if kept is not None and keep_states else run()
        y, final_state, chunk_states, split_steps = results
        if keep_states:
            ctx.softplus, ctx.grad_z_into = softplus, grad_z_into
            ctx.save_for_backward(*inputs, y, chunk_states, split_steps)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        *saved, y, chunk_states, split_steps = ctx.saved_tensors
        inputs = ScanInputs(*saved)
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        grad_final = None if grad_final is None else grad_final.contiguous()
        kept = (y, chunk_states, split_steps)
        dz = None if inputs.z is None else empty_gradient(inputs.z, ctx.grad_z_into, aligned_to=4)
        gradients = run_backward(inputs, ctx.softplus, kept, (grad_y, grad_final), dz)
        return None, None, None, *gradients, None
