# mypy: allow-untyped-calls
"""Launches the Triton kernels of the SSD scan; imported only where they are wanted.

The backward carries the states and, from the end, their gradients over the sequence once more,
writes them down at each chunk, and then takes the chunks' gradients independently.

B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk.
"""

from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.ssd import triton_backward, triton_forward
from mamba_dist.ops.ssd.triton_problem import (
    HEADS,
    PROGRAMS,
    Problem,
    ceiling,
    prepare,
    row_slices,
)

_PASS_BLOCK: Final = 1024

_States = tuple[Tensor | None, Tensor | None]
_NO_STATES: Final = None, None


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
) -> None:
    """Fills y (B, L, H, P) and the final state (B, H, P, N), both contiguous."""
    problem = prepare(x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus, chunk_size)
    starts = _segment_starts(problem, (x, B), initial_state, reverse=False)
    _scan(problem, (x, B, C), starts, (y, _NO_STATES, final_state), reverse=False)


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    grad_y: Tensor,
    grad_final: Tensor | None,
    gradients: tuple[Tensor, ...],
) -> None:
    """Fills the gradients of x, dt, A, B, C, D, dt_bias and the initial state.

    All are contiguous, but that those of x, dt, B and C may leave gaps between positions.
    `grad_y` (B, L, H, P) is in x's dtype or fp32, with a unit stride of P; an empty gradient is not
    wanted.
    """
    per_position = gradients[0], gradients[1], gradients[3], gradients[4]
    grad_initial = gradients[7] if initial_state is not None else None
    sums = []
    for rows in row_slices(x, B, chunk_size):

        def of_rows(tensor: Tensor | None, rows: slice = rows) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        problem = prepare(
            *(x[rows], dt[rows], A, B[rows], C[rows], D, dt_bias),
            *(of_rows(seq_idx), dt_softplus, chunk_size),
        )
        parts = [tensor[rows] for tensor in per_position]
        states, grad_states = (_new_chunk_states(problem) for _ in range(2))
        forwards, backwards = (x[rows], B[rows]), (grad_y[rows], C[rows])
        starts = _segment_starts(problem, forwards, of_rows(initial_state), reverse=False)
        _carry(problem, forwards, starts, states, None, reverse=False)
        starts = _segment_starts(problem, backwards, of_rows(grad_final), reverse=True)
        results = parts[0], grad_states, of_rows(grad_initial)
        _scan(problem, (*backwards, B[rows]), starts, results, reverse=True)
        sums.append(_gradients_of_rows(problem, grad_y[rows], states, grad_states, parts[1:]))
    of_A, of_bias, of_D = torch.stack(sums).sum(0)
    gradients[2].copy_(of_A)
    if D is not None:
        gradients[5].copy_(of_D)
    if dt_bias is not None:
        gradients[6].copy_(of_bias)


def _segment_starts(
    problem: Problem, inputs: tuple[Tensor, Tensor], initial: Tensor | None, *, reverse: bool
) -> Tensor | None:
    """The states (B, H, segments, P, N) that the segments start from; None is zeros."""
    segments = problem.segments
    if segments == 1:
        return initial
    (batch, _, heads, headdim), d_state = problem.x.shape, problem.B.shape[3]
    shape = batch, heads, segments, headdim, d_state
    local, starts = (problem.steps.new_empty(shape) for _ in range(2))
    _carry(problem, inputs, None, _NO_STATES, local, reverse=reverse)
    size = headdim * d_state
    triton_forward.pass_states[(ceiling(size, _PASS_BLOCK), batch * heads)](
        *(local, initial, starts, problem.decays, problem.numbers),
        *(heads, problem.chunks, segments, problem.segment_chunks, size),
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        HAS_DOCUMENTS=problem.numbers is not None,
        Q=problem.chunk,
        BLOCK=_PASS_BLOCK,
    )
    return starts


def _new_chunk_states(problem: Problem) -> _States:
    """Room for (B, H, blocks, chunks, BLOCK_P, BLOCK_N): fp32, or fp16 over scales (..., 2)."""
    chunks = *problem.steps.shape[:2], problem.blocks, problem.chunks
    shape = *chunks, problem.block_p, problem.block_n
    if problem.x.dtype == torch.float32:
        return problem.steps.new_empty(shape), None
    states = problem.steps.new_empty(shape, dtype=torch.float16)
    return states, problem.steps.new_empty(*chunks, 2)


def _scan(
    problem: Problem,
    inputs: tuple[Tensor, Tensor, Tensor],
    starts: Tensor | None,
    results: tuple[Tensor, _States, Tensor | None],
    *,
    reverse: bool,
) -> None:
    """Runs `scan_chunks` from values, written and read to out, states at the chunks and end."""
    batch, length, heads, _ = problem.x.shape
    out, chunk_states, end = results
    triton_forward.scan_chunks[(problem.segments * heads * problem.blocks, batch)](
        *(*inputs, problem.D, problem.steps, problem.decays, problem.numbers),
        *(starts, out, *chunk_states, end, length, heads, problem.per_group, problem.blocks),
        *(problem.segments, problem.segment_chunks),
        *(stride for tensor in inputs for stride in tensor.stride()[:3]),
        *out.stride()[:2],
        REVERSE=reverse,
        HAS_D=problem.D is not None,
        HAS_START=starts is not None,
        STORE_CHUNKS=chunk_states[0] is not None,
        STORE_END=end is not None,
        num_warps=problem.tuning.scan_warps,
        num_stages=problem.tuning.reverse_stages if reverse else problem.tuning.scan_stages,
        **problem.options,
    )


def _carry(
    problem: Problem,
    inputs: tuple[Tensor, Tensor],
    starts: Tensor | None,
    chunk_states: _States,
    ends: Tensor | None,
    *,
    reverse: bool,
) -> None:
    batch, length, heads, _ = problem.x.shape
    triton_forward.carry_states[(problem.segments * heads * problem.blocks, batch)](
        *(*inputs, problem.steps, problem.decays, problem.numbers),
        *(starts, *chunk_states, ends, length, heads, problem.per_group, problem.blocks),
        *(problem.segments, problem.segment_chunks),
        *(stride for tensor in inputs for stride in tensor.stride()[:3]),
        REVERSE=reverse,
        HAS_START=starts is not None,
        STORE_CHUNKS=chunk_states[0] is not None,
        STORE_ENDS=ends is not None,
        num_warps=problem.tuning.carry_warps,
        num_stages=problem.tuning.carry_stages,
        **problem.options,
    )


def _gradients_of_rows(
    problem: Problem,
    grad_y: Tensor,
    states: _States,
    grad_states: _States,
    gradients: list[Tensor],
) -> Tensor:
    """Fills the gradients of dt, B and C; gives (3, H) of A, the bias and D."""
    x, B, C = problem.x, problem.B, problem.C
    batch, length, heads, _ = x.shape
    groups, d_state = B.shape[2:]
    tuning = problem.tuning
    programs = batch * problem.chunks * groups
    units = problem.per_group * problem.blocks
    of_scores, of_states = (
        _per_program(units, programs, most) for most in (tuning.score_units, tuning.state_units)
    )
    score_splits, state_splits = ceiling(units, of_scores), ceiling(units, of_states)
    parts = score_splits + state_splits
    by_position = problem.steps.new_empty(6, batch, heads, problem.blocks, problem.steps.shape[2])
    by_chunk = problem.steps.new_empty(batch, heads, problem.blocks, problem.chunks)
    sum_B, sum_C = (
        problem.steps.new_empty(batch, length, groups, parts, d_state) for _ in range(2)
    )
    cut = length, heads, groups, problem.per_group, problem.blocks
    triton_backward.score_gradients[(problem.chunks * score_splits, batch * groups)](
        *(x, B, C, grad_y, problem.steps, problem.decays, problem.numbers),
        *(states[1], grad_states[1], sum_B, sum_C, by_position),
        *(*cut, score_splits, of_scores, parts, by_position[0].numel()),
        *(stride for tensor in (x, B, C, grad_y) for stride in tensor.stride()[:3]),
        num_warps=tuning.score_warps,
        num_stages=tuning.score_stages,
        **problem.options,
    )
    for reverse, (values, vectors), kept, others, sums, term in (
        (True, (x, B), grad_states, states, sum_B, by_position[4]),
        (False, (grad_y, C), states, grad_states, sum_C, by_position[5]),
    ):
        triton_backward.state_gradients[(problem.chunks * state_splits, batch * groups)](
            *(values, vectors, problem.steps, problem.decays, problem.numbers),
            *(*kept, *others, sums, term, by_chunk),
            *(*cut, state_splits, of_states, parts, score_splits),
            *(stride for tensor in (values, vectors) for stride in tensor.stride()[:3]),
            REVERSE=reverse,
            num_warps=tuning.state_warps,
            num_stages=tuning.state_stages,
            **problem.options,
        )
    grad_dt, grad_B, grad_C = gradients
    grad_B.copy_(sum_B.sum(3))
    grad_C.copy_(sum_C.sum(3))
    return _finish_steps(problem, by_position, by_chunk, grad_dt)


def _finish_steps(
    problem: Problem, by_position: Tensor, by_chunk: Tensor, grad_dt: Tensor
) -> Tensor:
    batch, length, heads, _ = problem.x.shape
    sums = by_chunk.new_empty(3, batch, heads, problem.chunks)
    triton_backward.finish_steps[(problem.chunks, ceiling(heads, HEADS), batch)](
        *(problem.dt, problem.dt_bias, problem.A, problem.steps, problem.numbers),
        *(by_position, by_chunk, grad_dt, sums, length, heads, problem.blocks, problem.chunks),
        *(by_position[0].numel(), sums[0].numel(), *problem.dt.stride(), *grad_dt.stride()[:2]),
        HAS_BIAS=problem.dt_bias is not None,
        SOFTPLUS=problem.dt_softplus,
        HAS_DOCUMENTS=problem.numbers is not None,
        Q=problem.chunk,
        HEADS=HEADS,
        num_warps=2,
    )
    return sums.sum((1, 3))


def _per_program(units: int, programs: int, most: int) -> int:
    """Heads, or blocks of them, of one program: fewer where there would be too few programs."""
    return max(1, min(most, units * programs // PROGRAMS, units))
