"""Selective scan in plain PyTorch: chunks that fit the cache, recomputation, gradients by hand.

The recurrence is that of arXiv 2312.00752, equation 2, with the recomputation of its section 3.3.2:
the forward keeps the state at chunk starts only, the backward rebuilds each chunk from there, and
nothing of size (B, L, E, N) ever exists.

This file has the loops over rows and chunks; `chunk.py` has the arithmetic of one chunk.

Forward and backward of B4 L512 E512 N16 on one core: 81 ms at best; taking turns with the
reference on a busy machine, 105 ms against 315.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import reset_mask
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.precision import autocast_disabled, compute_dtype
from mamba_dist.ops.selective_scan.chunk import (
    Block,
    Gradients,
    Inputs,
    Scratch,
    chunk_backward,
    fill_adjoint,
    fill_states,
    gate_backward,
    load,
    ungated_output,
)

# Elements of (R, N, E) per step below which a step's launch costs more than its arithmetic.
_CPU_STEP_ELEMENTS = 1 << 15
# Elements of one (Q, R, N, E) block, 1 MiB in fp32; the backward keeps three of them alive.
_CPU_BLOCK_ELEMENTS = 1 << 18
# Shortest chunk (the states before all chunks are kept) and longest.
_CPU_CHUNK_STEPS = (16, 64)
# Accelerators want few, large launches.
_ACCELERATOR_CHUNK = 64


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
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    with autocast_disabled(u):
        if u.shape[1] == 1:
            return _single_step(*tensors, delta_softplus, initial_state)
        resets = reset_mask(seq_idx)
        reset_steps: frozenset[int] = frozenset()
        if resets is not None:
            reset_steps = frozenset(resets.any(0).nonzero().flatten().tolist())
        options = (delta_softplus, resets, reset_steps)
        with_gradient = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (*tensors, initial_state)
        )
        if with_gradient:
            y, state = _SelectiveScan.apply(  # type: ignore[no-untyped-call]
                *tensors, *options, initial_state
            )
            return y, state
        y, state, _ = _forward(Inputs(*tensors, *options), initial_state, keep=False)
        return y, state


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        resets: Tensor | None,
        reset_steps: frozenset[int],
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        options = (delta_softplus, resets, reset_steps)
        inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, *options)
        y, final_state, chunk_states = _forward(inputs, initial_state, keep=True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, chunk_states)
        ctx.options = options
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        *saved, chunk_states = ctx.saved_tensors
        inputs = Inputs(*saved, *ctx.options)
        with autocast_disabled(inputs.u):
            gradients = Gradients(inputs)
            if grad_y is None:
                grad_y = torch.zeros_like(inputs.u)
            grad_initial = _backward(
                inputs, chunk_states, grad_y=grad_y, grad_final=grad_final, gradients=gradients
            )
            if ctx.initial_dtype is None:
                return *gradients.finish(), None, None, None, None
            return *gradients.finish(), None, None, None, grad_initial.to(ctx.initial_dtype)


def _single_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decoding: one step in few launches, differentiated by autograd."""
    dtype = compute_dtype(u)
    (batch, _, channels), groups = u.shape, B.shape[2]
    x, step = u[:, 0].to(dtype), delta[:, 0].to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    per_group = (batch, groups, channels // groups)
    inflow = (step * x).view(*per_group, 1) * B[:, 0, :, None].to(dtype)
    if initial_state is None:
        initial_state = inflow.new_zeros(batch, *A.shape)
    decay = torch.exp(step[..., None] * A.to(dtype))
    before = initial_state.to(dtype).reshape(inflow.shape)
    state = torch.addcmul(inflow, decay.view_as(inflow), before)
    y = (state * C[:, 0, :, None].to(dtype)).sum(-1).view(batch, channels)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype))
    if z is not None:
        y = y * F.silu(z[:, 0].to(dtype))
    return y.to(u.dtype)[:, None], state.view(batch, channels, -1)


def _block_shape(inputs: Inputs) -> tuple[int, int]:
    """Rows and steps per block; a function of the shapes and the device type only."""
    (batch, length, channels), d_state = inputs.u.shape, inputs.A.shape[1]
    if inputs.u.device.type != "cpu":
        return batch, min(length, _ACCELERATOR_CHUNK)
    rows = min(batch, max(1, _CPU_STEP_ELEMENTS // (channels * d_state)))
    shortest, longest = _CPU_CHUNK_STEPS
    fitting = _CPU_BLOCK_ELEMENTS // (rows * channels * d_state)
    return rows, min(length, longest, max(shortest, fitting))


def _row_blocks(inputs: Inputs) -> Iterator[list[Block]]:
    """For each group of rows its chunks, first to last."""
    rows, steps = _block_shape(inputs)
    batch, length = inputs.u.shape[:2]
    for first in range(0, batch, rows):
        yield [
            Block(
                slice(first, min(first + rows, batch)), slice(start, min(start + steps, length)), i
            )
            for i, start in enumerate(range(0, length, steps))
        ]


def _scratch(inputs: Inputs, *, adjoint: bool) -> Scratch:
    rows, steps = _block_shape(inputs)
    state = (inputs.groups, inputs.A.shape[1], inputs.u.shape[2] // inputs.groups)

    def block(length: int) -> Tensor:
        return torch.empty(length, rows, *state, dtype=inputs.dtype, device=inputs.u.device)

    return Scratch(block(steps), block(steps + 1), block(steps if adjoint else 0))


def _forward(
    inputs: Inputs, initial_state: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state (B, E, N), and if `keep` the states before each chunk (C, B, G, N, F)."""
    (batch, length, channels), d_state = inputs.u.shape, inputs.A.shape[1]
    A = inputs.by_group(inputs.A)
    if initial_state is None:
        initial_state = A.new_zeros(batch, channels, d_state)
    # A copy: the state is advanced in place, and the caller may use its own again.
    current = inputs.by_group(initial_state).clone()
    scratch = _scratch(inputs, adjoint=False)
    y = torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
    chunks = -(-length // _block_shape(inputs)[1])
    chunk_states = current.new_empty(chunks, *current.shape) if keep else None
    for blocks in _row_blocks(inputs):
        for block in blocks:
            chunk = load(inputs, block, A=A)
            part = scratch.cut(chunk)
            before = current[block.rows]
            if chunk_states is not None:
                chunk_states[block.index, block.rows] = before
            fill_states(chunk, part, before=before)
            y_chunk = ungated_output(chunk, part)
            if chunk.z is not None:
                y_chunk.mul_(F.silu(chunk.z))
            y[block.where] = y_chunk.transpose(0, 1)
            before.copy_(part.states[-1])
    return y, current.mT.reshape(batch, channels, d_state), chunk_states


def _backward(
    inputs: Inputs,
    chunk_states: Tensor,
    *,
    grad_y: Tensor,
    grad_final: Tensor | None,
    gradients: Gradients,
) -> Tensor:
    """Fills `gradients` and gives the initial state's gradient (B, E, N)."""
    A = inputs.by_group(inputs.A)
    scratch = _scratch(inputs, adjoint=True)
    # What the later chunks send back to the state at a chunk's end.
    inflow = torch.zeros_like(chunk_states[0])
    if grad_final is not None:
        inflow.copy_(inputs.by_group(grad_final))
    for blocks in _row_blocks(inputs):
        for block in reversed(blocks):
            chunk = load(inputs, block, A=A)
            part = scratch.cut(chunk)
            fill_states(chunk, part, before=chunk_states[block.index, block.rows])
            grad = grad_y[block.where].transpose(0, 1).to(inputs.dtype).contiguous()
            grad = gate_backward(chunk, part, grad=grad, gradients=gradients)
            fill_adjoint(chunk, part, grad=grad, inflow=inflow[block.rows])
            chunk_backward(chunk, part, grad=grad, gradients=gradients)
    return inflow.mT.reshape(inputs.u.shape[0], *inputs.A.shape)
