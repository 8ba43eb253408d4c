"""Selective scan in plain PyTorch: chunks that fit the cache, recomputation, gradients by hand.

The recurrence is that of arXiv 2312.00752, equation 2, with the recomputation of its section 3.3.2:
the forward keeps the state at chunk starts only, the backward rebuilds each chunk from there, and
nothing of size (B, L, E, N) ever exists.

Inside a chunk all tensors are time-major with the channels last, (Q, R, G, N, F): a time step is
one contiguous block, and each broadcast (delta over N, B and C over F) runs along the channels.
R rows of the batch at a time, Q steps, G groups, N d_state, F = E / G channels per group.

With B4 L512 E512 N16 on one core (Zen 5), forward and backward take about 70 ms; the same loop
with autograd over the steps took 30 times as long.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import reset_mask
from mamba_dist.ops.precision import autocast_disabled, compute_dtype

_LOG2_E = math.log2(math.e)
# Elements of (R, N, E) per step below which a step's launch costs more than its arithmetic.
_CPU_STEP_ELEMENTS = 1 << 15
# Elements of one (Q, R, N, E) block, 1 MiB in fp32; the backward keeps three of them alive.
_CPU_BLOCK_ELEMENTS = 1 << 18
# Shortest chunk (the states before all chunks are kept) and longest.
_CPU_CHUNK_STEPS = (16, 64)
# Accelerators want few, large launches.
_ACCELERATOR_CHUNK = 64


@dataclass(frozen=True)
class _Inputs:
    """The op's tensors as saved for the backward; the shapes are those of the public function."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    resets: Tensor | None
    # positions where any row has a reset; on the host, so that other steps pay nothing
    reset_steps: frozenset[int]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.u)

    @property
    def groups(self) -> int:
        return self.B.shape[2]

    def by_group(self, per_channel: Tensor) -> Tensor:
        """(E, N) or (E,) per channel, laid out (G, N, F) or (G, 1, F) in the compute dtype."""
        per_group = per_channel.to(self.dtype).reshape(self.groups, -1, *per_channel.shape[1:])
        return (per_group if per_group.dim() == 3 else per_group[..., None]).mT.contiguous()


@dataclass(frozen=True)
class _Block:
    """Rows and positions handled together; `index` counts the chunks of the sequence."""

    rows: slice
    steps: slice
    index: int


@dataclass(frozen=True)
class _Chunk:
    """One block's inputs in the compute dtype, time-major: (Q, R, E); B and C (Q, R, G, N)."""

    u: Tensor
    raw_delta: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    # step in the chunk -> (R, 1, 1, 1) bool, true for rows whose document starts at that step
    resets: dict[int, Tensor]


@dataclass(frozen=True)
class _Scratch:
    """Blocks reused by all chunks: fresh ones would cost more in page faults than in arithmetic."""

    decay: Tensor  # (Q, R, G, N, F)
    states: Tensor  # (Q + 1, R, G, N, F), the first is the state before the chunk
    adjoint: Tensor  # (Q, R, G, N, F), gradient with respect to each state

    def cut(self, chunk: _Chunk) -> "_Scratch":
        steps, rows = chunk.u.shape[:2]
        return _Scratch(
            self.decay[:steps, :rows], self.states[: steps + 1, :rows], self.adjoint[:steps, :rows]
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
        y, state, _ = _forward(_Inputs(*tensors, *options), initial_state, keep=False)
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
        inputs = _Inputs(u, delta, A, B, C, D, z, delta_bias, *options)
        y, final_state, chunk_states = _forward(inputs, initial_state, keep=True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, chunk_states)
        ctx.options = options
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        *saved, chunk_states = ctx.saved_tensors
        inputs = _Inputs(*saved, *ctx.options)
        with autocast_disabled(inputs.u):
            gradients = _Gradients(inputs)
            if grad_y is None:
                grad_y = torch.zeros_like(inputs.u)
            grad_initial = _backward(inputs, chunk_states, grad_y, grad_final, gradients)
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


def _chunk_steps(inputs: _Inputs) -> tuple[int, int]:
    """Rows and steps per block; a function of the shapes and the device type only."""
    (batch, length, channels), d_state = inputs.u.shape, inputs.A.shape[1]
    if inputs.u.device.type != "cpu":
        return batch, min(length, _ACCELERATOR_CHUNK)
    rows = min(batch, max(1, _CPU_STEP_ELEMENTS // (channels * d_state)))
    shortest, longest = _CPU_CHUNK_STEPS
    fitting = _CPU_BLOCK_ELEMENTS // (rows * channels * d_state)
    return rows, min(length, longest, max(shortest, fitting))


def _row_blocks(inputs: _Inputs) -> Iterator[list[_Block]]:
    """For each group of rows its chunks, first to last."""
    rows, steps = _chunk_steps(inputs)
    batch, length = inputs.u.shape[:2]
    for first in range(0, batch, rows):
        yield [
            _Block(
                slice(first, min(first + rows, batch)), slice(start, min(start + steps, length)), i
            )
            for i, start in enumerate(range(0, length, steps))
        ]


def _scratch(inputs: _Inputs, *, adjoint: bool) -> _Scratch:
    rows, steps = _chunk_steps(inputs)
    state = (inputs.groups, inputs.A.shape[1], inputs.u.shape[2] // inputs.groups)

    def block(length: int) -> Tensor:
        return torch.empty(length, rows, *state, dtype=inputs.dtype, device=inputs.u.device)

    return _Scratch(block(steps), block(steps + 1), block(steps if adjoint else 0))


def _load(inputs: _Inputs, block: _Block) -> _Chunk:
    def time_major(tensor: Tensor) -> Tensor:
        return tensor[block.rows, block.steps].transpose(0, 1).to(inputs.dtype).contiguous()

    raw_delta = time_major(inputs.delta)
    if inputs.delta_bias is not None:
        raw_delta = raw_delta + inputs.delta_bias.to(inputs.dtype)
    resets: dict[int, Tensor] = {}
    if inputs.resets is not None:
        for step in range(block.steps.start, block.steps.stop):
            if step in inputs.reset_steps:
                mask = inputs.resets[block.rows, step, None, None, None]
                resets[step - block.steps.start] = mask
    return _Chunk(
        u=time_major(inputs.u),
        raw_delta=raw_delta,
        delta=F.softplus(raw_delta) if inputs.delta_softplus else raw_delta,
        B=time_major(inputs.B),
        C=time_major(inputs.C),
        z=None if inputs.z is None else time_major(inputs.z),
        resets=resets,
    )


def _fill(chunk: _Chunk, log2_decay: Tensor, before: Tensor, scratch: _Scratch) -> None:
    """Fills the scratch's decay and states from the state `before` the chunk (R, G, N, F)."""
    groups = chunk.B.shape[2]
    delta = _over_d_state(chunk.delta, groups)
    # exp2 is 3 times faster than exp on CPU; its rounding is that of the product delta * A.
    torch.mul(delta, log2_decay, out=scratch.decay).exp2_()
    scratch.states[0] = before
    inflow = _over_d_state(chunk.delta * chunk.u, groups)
    torch.mul(inflow, chunk.B[..., None], out=scratch.states[1:])
    states = scratch.states.unbind(0)
    for step, decay in enumerate(scratch.decay.unbind(0)):
        previous = states[step]
        if step in chunk.resets:
            previous = previous.masked_fill(chunk.resets[step], 0.0)
        states[step + 1].addcmul_(decay, previous)


def _over_d_state(values: Tensor, groups: int) -> Tensor:
    """(Q, R, E) as (Q, R, G, 1, F), to broadcast over N."""
    return values.view(*values.shape[:2], groups, 1, -1)


def _sum_d_state(coefficients: Tensor, block: Tensor) -> Tensor:
    """Sum over N of (Q, R, G, N) times (Q, R, G, N, F), as (Q, R, E)."""
    steps, rows, groups, d_state, width = block.shape
    flat = torch.bmm(coefficients.reshape(-1, 1, d_state), block.reshape(-1, d_state, width))
    return flat.view(steps, rows, groups * width)


def _sum_channels(values: Tensor, block: Tensor) -> Tensor:
    """Sum over each group's channels of (Q, R, E) times (Q, R, G, N, F), as (Q, R, G, N)."""
    steps, rows, groups, d_state, width = block.shape
    # As (1, F) x (F, N): MKL takes 12 times longer for the same sum as (N, F) x (F, 1).
    flat = torch.bmm(values.reshape(-1, 1, width), block.reshape(-1, d_state, width).mT)
    return flat.view(steps, rows, groups, d_state)


def _ungated_output(inputs: _Inputs, chunk: _Chunk, states: Tensor) -> Tensor:
    y = _sum_d_state(chunk.C, states)
    return y if inputs.D is None else y.addcmul_(chunk.u, inputs.D.to(inputs.dtype))


def _forward(
    inputs: _Inputs, initial_state: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state (B, E, N), and if `keep` the states before each chunk (C, B, G, N, F)."""
    (batch, length, channels), d_state = inputs.u.shape, inputs.A.shape[1]
    scratch = _scratch(inputs, adjoint=False)
    log2_decay = inputs.by_group(inputs.A) * _LOG2_E
    y = torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
    state_shape = (batch, inputs.groups, d_state, channels // inputs.groups)
    current = log2_decay.new_zeros(state_shape)
    if initial_state is not None:
        current.copy_(torch.unflatten(initial_state, 1, (inputs.groups, -1)).mT)
    chunks = -(-length // _chunk_steps(inputs)[1])
    chunk_states = current.new_empty(chunks, *state_shape) if keep else None
    for blocks in _row_blocks(inputs):
        for block in blocks:
            chunk = _load(inputs, block)
            part = scratch.cut(chunk)
            before = current[block.rows]
            if chunk_states is not None:
                chunk_states[block.index, block.rows] = before
            _fill(chunk, log2_decay, before, part)
            y_chunk = _ungated_output(inputs, chunk, part.states[1:])
            if chunk.z is not None:
                y_chunk.mul_(F.silu(chunk.z))
            y[block.rows, block.steps] = y_chunk.transpose(0, 1)
            before.copy_(part.states[-1])
    return y, current.mT.reshape(batch, channels, d_state), chunk_states


class _Gradients:
    """Gradients under construction: full tensors per position, sums per channel."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs
        zeros = inputs.by_group(inputs.A).new_zeros
        contiguous = torch.contiguous_format
        self.u = torch.empty_like(inputs.u, memory_format=contiguous)
        self.delta = torch.empty_like(inputs.delta, memory_format=contiguous)
        self.B = torch.empty_like(inputs.B, memory_format=contiguous)
        self.C = torch.empty_like(inputs.C, memory_format=contiguous)
        self.z = None if inputs.z is None else torch.empty_like(inputs.z, memory_format=contiguous)
        channels, d_state = inputs.A.shape
        self.A = zeros(inputs.groups, d_state, channels // inputs.groups)
        self.D = zeros(channels)
        self.delta_bias = zeros(channels)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of (u, delta, A, B, C, D, z, delta_bias), each in its tensor's dtype."""
        inputs = self._inputs
        grad_A = self.A.mT.reshape(inputs.A.shape).to(inputs.A.dtype)
        grad_D = None if inputs.D is None else self.D.to(inputs.D.dtype)
        bias = inputs.delta_bias
        grad_bias = None if bias is None else self.delta_bias.to(bias.dtype)
        return self.u, self.delta, grad_A, self.B, self.C, grad_D, self.z, grad_bias


def _backward(
    inputs: _Inputs,
    chunk_states: Tensor,
    grad_y: Tensor,
    grad_final: Tensor | None,
    gradients: _Gradients,
) -> Tensor:
    """Fills `gradients` and gives the initial state's gradient (B, E, N)."""
    scratch = _scratch(inputs, adjoint=True)
    A = inputs.by_group(inputs.A)
    # What the later chunks send back to the state at this chunk's end, (B, G, N, F).
    inflow = torch.zeros_like(chunk_states[0])
    if grad_final is not None:
        inflow.copy_(torch.unflatten(grad_final, 1, (inputs.groups, -1)).mT)
    for blocks in _row_blocks(inputs):
        for block in reversed(blocks):
            chunk = _load(inputs, block)
            part = scratch.cut(chunk)
            _fill(chunk, A * _LOG2_E, chunk_states[block.index, block.rows], part)
            grad = grad_y[block.rows, block.steps].transpose(0, 1).to(inputs.dtype).contiguous()
            if chunk.z is not None:
                grad = _gate_backward(inputs, chunk, part, grad, gradients, block)
            _adjoint(chunk, grad, inflow[block.rows], part)
            _chunk_backward(inputs, chunk, part, grad, gradients, block, A)
    return inflow.mT.reshape(inputs.u.shape[0], *inputs.A.shape)


def _gate_backward(
    inputs: _Inputs,
    chunk: _Chunk,
    scratch: _Scratch,
    grad: Tensor,
    gradients: _Gradients,
    block: _Block,
) -> Tensor:
    """Stores z's gradient and gives that of the ungated output."""
    assert chunk.z is not None
    assert gradients.z is not None
    gate = torch.sigmoid(chunk.z)
    silu = chunk.z * gate
    slope = torch.addcmul(gate, silu, 1.0 - gate)  # silu' = s + z s (1 - s)
    y = _ungated_output(inputs, chunk, scratch.states[1:])
    gradients.z[block.rows, block.steps] = y.mul_(grad).mul_(slope).transpose(0, 1)
    return silu.mul_(grad)


def _adjoint(chunk: _Chunk, grad: Tensor, inflow: Tensor, scratch: _Scratch) -> None:
    """Fills the adjoint by the reverse recurrence; `inflow` moves to the chunk's start."""
    groups = chunk.B.shape[2]
    torch.mul(_over_d_state(grad, groups), chunk.C[..., None], out=scratch.adjoint)
    scratch.adjoint[-1].add_(inflow)
    decays, adjoints = scratch.decay.unbind(0), scratch.adjoint.unbind(0)
    for step in range(len(decays) - 1, 0, -1):
        if step in chunk.resets:
            sent = decays[step] * adjoints[step]
            adjoints[step - 1].add_(sent.masked_fill_(chunk.resets[step], 0.0))
        else:
            adjoints[step - 1].addcmul_(decays[step], adjoints[step])
    torch.mul(decays[0], adjoints[0], out=inflow)
    if 0 in chunk.resets:
        inflow.masked_fill_(chunk.resets[0], 0.0)


def _chunk_backward(
    inputs: _Inputs,
    chunk: _Chunk,
    scratch: _Scratch,
    grad: Tensor,
    gradients: _Gradients,
    block: _Block,
    A: Tensor,
) -> None:
    """Stores or adds the chunk's gradients of all but z; destroys the scratch."""
    groups, where = chunk.B.shape[2], (block.rows, block.steps)
    adjoint = scratch.adjoint
    gradients.C[where] = _sum_channels(grad, scratch.states[1:]).transpose(0, 1)
    gradients.B[where] = _sum_channels(chunk.delta * chunk.u, adjoint).transpose(0, 1)
    grad_product = _sum_d_state(chunk.B, adjoint)  # of delta * u
    grad_u = grad_product * chunk.delta
    if inputs.D is not None:
        grad_u.addcmul_(grad, inputs.D.to(inputs.dtype))
        gradients.D.add_((grad * chunk.u).sum((0, 1)))
    gradients.u[where] = grad_u.transpose(0, 1)

    # Gradient with respect to the exponent delta * A: adjoint_t * decay_t * state_(t-1).
    exponent = scratch.decay.mul_(scratch.states[:-1]).mul_(adjoint)
    for step, mask in chunk.resets.items():
        exponent[step].masked_fill_(mask, 0.0)
    grad_delta = torch.mul(exponent, A, out=adjoint).sum(3).flatten(2)
    grad_delta.addcmul_(grad_product, chunk.u)
    gradients.A.add_(exponent.mul_(_over_d_state(chunk.delta, groups)).sum((0, 1)))
    if inputs.delta_softplus:
        grad_delta.mul_(torch.sigmoid(chunk.raw_delta))
    gradients.delta[where] = grad_delta.transpose(0, 1)
    if inputs.delta_bias is not None:
        gradients.delta_bias.add_(grad_delta.sum((0, 1)))
