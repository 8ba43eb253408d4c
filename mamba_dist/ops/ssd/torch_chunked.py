"""SSD scan in plain PyTorch: the chunked matmul form of arXiv 2405.21060, section 6.

Each document is cut into chunks of its own, and chunks run one after another. A chunk's output is
what its own inputs give (a Q x Q matrix per head, section 6.2's diagonal block) plus what the state
before it gives (sections 6.3 and 6.4). No chunk spans a document boundary, so nothing can leak
over one: a mask over a mixed chunk would not do, since zero times a neighbour's infinity is NaN.

The forward keeps the state before each chunk only; the backward redoes a chunk and differentiates
it by autograd, so that one chunk's Q x Q matrices exist at a time.

R rows, L length, Q chunk, H heads, P headdim, N d_state, G groups, J = H / G heads per group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import Span, document_spans
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.precision import autocast_disabled, compute_dtype

# B1 L1024 H24 P64 N128 forward and backward, one core: 162 ms with 32, 136 with 64, 152 with
# 128, 266 with 256.
_CPU_LONGEST_CHUNK = 64


class _Inputs(NamedTuple):
    """The op's tensors, whole or a chunk's part of them; the shapes are the public function's."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None


# Places in _Inputs of what has a value for each position; the others are parameters.
_PER_POSITION = frozenset({0, 1, 3, 4, 6})


@dataclass(frozen=True)
class _Chunk:
    """A run of steps inside one document; `index` numbers it among the kept states."""

    span: Span
    index: int
    is_first_of_row: bool
    is_first_of_document: bool
    is_last_of_row: bool

    @property
    def where(self) -> tuple[slice, slice]:
        return self.span.rows, slice(self.span.start, self.span.stop)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, H, P) in x's dtype and final state (B, H, P, N) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.ssd.ssd`. On CPU chunks are at most 64 steps.
    """
    dtype = compute_dtype(x)
    with autocast_disabled(x):
        if initial_state is not None:
            initial_state = initial_state.to(dtype)
        if x.shape[1] == 1:
            return _single_step(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state)
        longest = min(chunk_size, _CPU_LONGEST_CHUNK) if x.device.type == "cpu" else chunk_size
        chunks = _cut(
            document_spans(seq_idx, batch=x.shape[0], length=x.shape[1]), longest, x.shape[1]
        )
        y, state = _Ssd.apply(  # type: ignore[no-untyped-call]
            chunks, dt_softplus, x, dt, A, B, C, D, z, dt_bias, initial_state
        )
        return y, state


def _cut(spans: list[Span], longest: int, length: int) -> tuple[_Chunk, ...]:
    def pieces() -> Iterator[tuple[Span, Span]]:
        for span in spans:
            for start in range(span.start, span.stop, longest):
                stop = min(start + longest, span.stop)
                yield span, Span(span.first_row, span.last_row, start, stop)

    return tuple(
        _Chunk(piece, index, piece.start == 0, piece.start == span.start, piece.stop == length)
        for index, (span, piece) in enumerate(pieces())
    )


def _single_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decoding: one step in few launches, differentiated by autograd."""
    dtype, per_group = compute_dtype(x), x.shape[2] // B.shape[2]
    values, step = x[:, 0].to(dtype), dt[:, 0].to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    B_heads = B[:, 0].to(dtype).repeat_interleave(per_group, dim=1)[:, :, None]
    C_heads = C[:, 0].to(dtype).repeat_interleave(per_group, dim=1)[..., None]
    inflow = (values * step[..., None])[..., None] * B_heads
    if initial_state is None:
        initial_state = torch.zeros_like(inflow)
    state = torch.addcmul(inflow, torch.exp(step * A.to(dtype))[..., None, None], initial_state)
    y = (state @ C_heads)[..., 0]
    if D is not None:
        y = torch.addcmul(y, values, D.to(dtype)[:, None])
    if z is not None:
        y = y * F.silu(z[:, 0].to(dtype))
    return y.to(x.dtype)[:, None], state


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chunks: tuple[_Chunk, ...],
        dt_softplus: bool,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias)
        batch, _, heads, headdim = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        final = x.new_empty(batch, heads, headdim, B.shape[3], dtype=compute_dtype(x))
        before: list[Tensor | None] = []
        state: Tensor | None = None
        for chunk in chunks:
            if chunk.is_first_of_row:
                state = None if initial_state is None else initial_state[chunk.span.rows]
            elif chunk.is_first_of_document:
                state = None
            before.append(state)
            y[chunk.where], state = _chunk_scan(_part(inputs, chunk), state, dt_softplus)
            if chunk.is_last_of_row:
                final[chunk.span.rows] = state
        ctx.save_for_backward(*inputs, *before)
        ctx.chunks, ctx.dt_softplus = chunks, dt_softplus
        ctx.has_initial_state = initial_state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        # Under activation checkpointing saved tensors can be unpacked only once.
        saved = ctx.saved_tensors
        inputs, before = _Inputs._make(saved[:8]), saved[8:]
        with autocast_disabled(inputs.x):
            if grad_y is None:
                grad_y = torch.zeros_like(inputs.x)
            totals = _Totals(inputs)
            grad_initial = _backward(
                ctx.chunks, ctx.dt_softplus, inputs, before, totals, grad_y, grad_final
            )
            gradients = totals.finish()
        return None, None, *gradients, grad_initial if ctx.has_initial_state else None


def _part(inputs: _Inputs, chunk: _Chunk) -> _Inputs:
    """What the chunk needs of the inputs, in the compute dtype.

    Contiguous: silu rounds otherwise on strided memory, and equal inputs should give equal
    bits whichever projection they were cut from.
    """
    dtype = compute_dtype(inputs.x)

    def part(place: int, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or place not in _PER_POSITION:
            return None if tensor is None else tensor.to(dtype)
        return tensor[chunk.where].to(dtype).contiguous()

    return _Inputs._make(part(place, tensor) for place, tensor in enumerate(inputs))


def _chunk_scan(inputs: _Inputs, state: Tensor | None, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """y (R, Q, H, P) and the state after the chunk (R, H, P, N); `state` None is a zero state."""
    x, dt, A, B, C, D, z, dt_bias = inputs
    rows, steps, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    # fp64: the sum over (j, i] as a difference of sums then keeps fp32's full precision; all of it
    # is one document's, so a difference cannot leak. Listing 1 takes Q x Q cumulative sums.
    log_decay = (dt * A).double().cumsum(1).transpose(1, 2)  # (R, H, Q), from the chunk's start
    segments = (log_decay[..., :, None] - log_decay[..., None, :]).to(x.dtype)  # (R, H, Q, Q)
    future = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu_(1)
    # Masked before exp, which overflows above the diagonal: inf times 0 is NaN in the gradient.
    decay = segments.masked_fill(future, -torch.inf).exp()  # L of equation 5

    B_by_group, C_by_group = B.transpose(1, 2), C.transpose(1, 2)  # (R, G, Q, N)
    scores = C_by_group @ B_by_group.mT  # (R, G, Q, Q)
    mixing = torch.unflatten(decay, 1, (groups, -1)) * scores[:, :, None]  # (R, G, J, Q, Q)
    inflow = (x * dt[..., None]).transpose(1, 2)  # (R, H, Q, P)
    y = mixing.flatten(1, 2) @ inflow  # section 6.2, the diagonal block

    to_end = (log_decay[..., -1:] - log_decay).to(x.dtype).exp()[..., None]  # (R, H, Q, 1)
    weighted = torch.unflatten(inflow * to_end, 1, (groups, -1)).mT.flatten(2, 3)  # (R, G, J P, Q)
    after = (weighted @ B_by_group).view(rows, heads, headdim, d_state)  # section 6.3, right factor
    if state is not None:
        from_start = log_decay.to(x.dtype).exp()[..., None]  # (R, H, Q, 1)
        after = torch.addcmul(after, from_start[:, :, -1:], state)  # section 6.3, chunk recurrence
        carried = C_by_group @ state.reshape(rows, groups, -1, d_state).mT  # (R, G, Q, J P)
        carried = torch.unflatten(carried, -1, (-1, headdim)).transpose(2, 3).flatten(1, 2)
        y = torch.addcmul(y, carried, from_start)  # section 6.3, left factor
    y = y.transpose(1, 2)
    if D is not None:
        y = torch.addcmul(y, x, D[:, None])
    return (y if z is None else y * F.silu(z)), after


class _Totals:
    """Gradients of the inputs under construction: parts by position, sums over the parameters."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs
        dtype = compute_dtype(inputs.x)
        self._gradients = [
            None
            if tensor is None
            else torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if i in _PER_POSITION
            else torch.zeros_like(tensor, dtype=dtype)
            for i, tensor in enumerate(inputs)
        ]

    def add(self, chunk: _Chunk, parts: list[Tensor | None]) -> None:
        for i, (total, part) in enumerate(zip(self._gradients, parts, strict=True)):
            if total is None or part is None:
                continue
            if i in _PER_POSITION:
                total[chunk.where] = part
            else:
                total.add_(part)

    def finish(self) -> list[Tensor | None]:
        return [
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(self._gradients, self._inputs, strict=True)
        ]


def _backward(
    chunks: tuple[_Chunk, ...],
    dt_softplus: bool,
    inputs: _Inputs,
    before: tuple[Tensor | None, ...],
    totals: _Totals,
    grad_y: Tensor,
    grad_final: Tensor | None,
) -> Tensor:
    """Adds each chunk's gradients to `totals` and gives the initial state's (B, H, P, N)."""
    batch, _, heads, headdim = inputs.x.shape
    dtype = compute_dtype(inputs.x)
    grad_initial = inputs.x.new_zeros(batch, heads, headdim, inputs.B.shape[3], dtype=dtype)
    grad_state: Tensor | None = None
    for chunk in reversed(chunks):
        if chunk.is_last_of_row:
            grad_state = None if grad_final is None else grad_final[chunk.span.rows]
        parts, grad_before = _chunk_backward(
            _part(inputs, chunk),
            before[chunk.index],
            dt_softplus,
            grad_y[chunk.where].to(dtype),
            grad_state,
        )
        totals.add(chunk, parts)
        if chunk.is_first_of_row and grad_before is not None:
            grad_initial[chunk.span.rows] = grad_before
        # None at a document's first chunk, which saw no state: nothing goes back over a boundary.
        grad_state = grad_before
    return grad_initial


def _chunk_backward(
    inputs: _Inputs,
    state: Tensor | None,
    dt_softplus: bool,
    grad_y: Tensor,
    grad_after: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Redoes one chunk and gives the gradients of its inputs and of the state before it."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_() for tensor in (*inputs, state)
    ]
    with torch.enable_grad():
        y, after = _chunk_scan(_Inputs._make(leaves[:-1]), leaves[-1], dt_softplus)
        outputs = [(y, grad_y)] if grad_after is None else [(y, grad_y), (after, grad_after)]
        given = torch.autograd.grad(
            [output for output, _ in outputs],
            [leaf for leaf in leaves if leaf is not None],
            [grad for _, grad in outputs],
            allow_unused=True,
            materialize_grads=True,
        )
    gradients = iter(given)
    *of_inputs, of_state = [None if leaf is None else next(gradients) for leaf in leaves]
    return of_inputs, of_state
