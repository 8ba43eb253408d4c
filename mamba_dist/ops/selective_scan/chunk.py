"""One chunk of the selective scan, forward and backward: the arithmetic inside the loops.

The recurrence is that of arXiv 2312.00752, equation 2. All tensors of a chunk are time-major with
the channels last, (Q, R, G, N, F): a time step is one contiguous block, and each broadcast (delta
over N, B and C over F) runs along the channels.

Q steps, R rows of the batch, G groups, N d_state, E channels, F = E / G channels per group.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.precision import compute_dtype

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Inputs:
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
        """(..., E, N) per channel as (..., G, N, F) in the compute dtype."""
        per_group = torch.unflatten(per_channel.to(self.dtype), -2, (self.groups, -1))
        return per_group.mT.contiguous()


@dataclass(frozen=True)
class Block:
    """Rows and positions handled together; `index` counts the chunks of the sequence."""

    rows: slice
    steps: slice
    index: int

    @property
    def where(self) -> tuple[slice, slice]:
        return self.rows, self.steps


@dataclass(frozen=True)
class Chunk:
    """One block's inputs in the compute dtype, time-major: (Q, R, E); B and C (Q, R, G, N)."""

    block: Block
    u: Tensor
    raw_delta: Tensor
    delta: Tensor
    A: Tensor  # (G, N, F)
    B: Tensor
    C: Tensor
    D: Tensor | None  # (E,)
    z: Tensor | None
    delta_softplus: bool
    # step in the chunk -> (R, 1, 1, 1) bool, true for rows whose document starts at that step
    resets: dict[int, Tensor]


@dataclass(frozen=True)
class Scratch:
    """Blocks reused by all chunks: fresh ones would cost more in page faults than in arithmetic."""

    decay: Tensor  # (Q, R, G, N, F)
    states: Tensor  # (Q + 1, R, G, N, F), the first is the state before the chunk
    adjoint: Tensor  # (Q, R, G, N, F), gradient with respect to each state

    def cut(self, chunk: Chunk) -> "Scratch":
        steps, rows = chunk.u.shape[:2]
        return Scratch(
            self.decay[:steps, :rows], self.states[: steps + 1, :rows], self.adjoint[:steps, :rows]
        )


class Gradients:
    """Gradients under construction: full tensors per position, sums per channel."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

        def like(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)

        self.u, self.delta = like(inputs.u), like(inputs.delta)
        self.B, self.C = like(inputs.B), like(inputs.C)
        self.z = None if inputs.z is None else like(inputs.z)
        self.A = torch.zeros_like(inputs.by_group(inputs.A))
        self.D = self.A.new_zeros(inputs.u.shape[2])
        self.delta_bias = torch.zeros_like(self.D)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of (u, delta, A, B, C, D, z, delta_bias), each in its tensor's dtype."""
        A, D, bias = self._inputs.A, self._inputs.D, self._inputs.delta_bias
        grad_A = self.A.mT.reshape(A.shape).to(A.dtype)
        grad_D = None if D is None else self.D.to(D.dtype)
        grad_bias = None if bias is None else self.delta_bias.to(bias.dtype)
        return self.u, self.delta, grad_A, self.B, self.C, grad_D, self.z, grad_bias


def load(inputs: Inputs, block: Block, *, A: Tensor) -> Chunk:
    """The block's chunk; `A` is by group, laid out once for all chunks."""

    def time_major(tensor: Tensor) -> Tensor:
        return tensor[block.where].transpose(0, 1).to(inputs.dtype).contiguous()

    raw_delta = time_major(inputs.delta)
    if inputs.delta_bias is not None:
        raw_delta = raw_delta + inputs.delta_bias.to(inputs.dtype)
    resets: dict[int, Tensor] = {}
    if inputs.resets is not None:
        for step in range(block.steps.start, block.steps.stop):
            if step in inputs.reset_steps:
                mask = inputs.resets[block.rows, step, None, None, None]
                resets[step - block.steps.start] = mask
    return Chunk(
        block=block,
        u=time_major(inputs.u),
        raw_delta=raw_delta,
        delta=F.softplus(raw_delta) if inputs.delta_softplus else raw_delta,
        A=A,
        B=time_major(inputs.B),
        C=time_major(inputs.C),
        D=None if inputs.D is None else inputs.D.to(inputs.dtype),
        z=None if inputs.z is None else time_major(inputs.z),
        delta_softplus=inputs.delta_softplus,
        resets=resets,
    )


def fill_states(chunk: Chunk, scratch: Scratch, *, before: Tensor) -> None:
    """Fills the scratch's decay and states from the state `before` the chunk (R, G, N, F)."""
    groups = chunk.B.shape[2]
    # exp2 is 3 times faster than exp on CPU; its rounding is that of the product delta * A.
    torch.mul(_over_d_state(chunk.delta, groups), chunk.A * _LOG2_E, out=scratch.decay).exp2_()
    scratch.states[0] = before
    inflow = _over_d_state(chunk.delta * chunk.u, groups)
    torch.mul(inflow, chunk.B[..., None], out=scratch.states[1:])
    states = scratch.states.unbind(0)
    for step, decay in enumerate(scratch.decay.unbind(0)):
        previous = states[step]
        if step in chunk.resets:
            previous = previous.masked_fill(chunk.resets[step], 0.0)
        states[step + 1].addcmul_(decay, previous)


def ungated_output(chunk: Chunk, scratch: Scratch) -> Tensor:
    """y before the gate, (Q, R, E), from the filled states."""
    y = _sum_d_state(chunk.C, scratch.states[1:])
    return y if chunk.D is None else y.addcmul_(chunk.u, chunk.D)


def gate_backward(chunk: Chunk, scratch: Scratch, *, grad: Tensor, gradients: Gradients) -> Tensor:
    """Gradient of the ungated output (Q, R, E), from that of the output; stores z's gradient."""
    if chunk.z is None or gradients.z is None:
        return grad
    gate = torch.sigmoid(chunk.z)
    silu = chunk.z * gate
    slope = torch.addcmul(gate, silu, 1.0 - gate)  # silu' = s + z s (1 - s)
    grad_z = ungated_output(chunk, scratch).mul_(grad).mul_(slope)
    gradients.z[chunk.block.where] = grad_z.transpose(0, 1)
    return silu.mul_(grad)


def fill_adjoint(chunk: Chunk, scratch: Scratch, *, grad: Tensor, inflow: Tensor) -> None:
    """Fills the adjoint by the reverse recurrence; `inflow` moves from end to start.

    `inflow` (R, G, N, F) is what later chunks send back to the state at this chunk's end.
    """
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


def chunk_backward(chunk: Chunk, scratch: Scratch, *, grad: Tensor, gradients: Gradients) -> None:
    """Stores or adds the chunk's gradients of all but z; destroys the scratch.

    `grad` (Q, R, E) is the gradient of the ungated output.
    """
    groups, where, adjoint = chunk.B.shape[2], chunk.block.where, scratch.adjoint
    gradients.C[where] = _sum_channels(grad, scratch.states[1:]).transpose(0, 1)
    gradients.B[where] = _sum_channels(chunk.delta * chunk.u, adjoint).transpose(0, 1)
    grad_product = _sum_d_state(chunk.B, adjoint)  # of delta * u
    grad_u = grad_product * chunk.delta
    if chunk.D is not None:
        grad_u.addcmul_(grad, chunk.D)
        gradients.D.add_((grad * chunk.u).sum((0, 1)))
    gradients.u[where] = grad_u.transpose(0, 1)

    # Gradient with respect to the exponent delta * A: adjoint_t * decay_t * state_(t-1).
    exponent = scratch.decay.mul_(scratch.states[:-1]).mul_(adjoint)
    for step, mask in chunk.resets.items():
        exponent[step].masked_fill_(mask, 0.0)
    grad_delta = torch.mul(exponent, chunk.A, out=adjoint).sum(3).flatten(2)
    grad_delta.addcmul_(grad_product, chunk.u)
    gradients.A.add_(exponent.mul_(_over_d_state(chunk.delta, groups)).sum((0, 1)))
    if chunk.delta_softplus:
        grad_delta.mul_(torch.sigmoid(chunk.raw_delta))
    gradients.delta[where] = grad_delta.transpose(0, 1)
    gradients.delta_bias.add_(grad_delta.sum((0, 1)))


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
