# mypy: allow-untyped-calls
"""Launches the Triton kernels of the SSD scan; imported only where they are wanted.

The backward carries the states and, from the end, their gradients over the sequence once more,
writes them down at each chunk, and then takes the chunks' gradients independently.

B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.ssd import triton_backward, triton_forward


@dataclass(frozen=True)
class Tuning:
    """What the kernels are compiled and launched with; only the last bits depend on it."""

    chunk: int
    scan_warps: int
    scan_stages: int
    carry_warps: int
    carry_stages: int
    score_warps: int
    score_stages: int
    state_warps: int
    state_stages: int
    # Heads, or blocks of them, that one program adds up the gradients of B and C over.
    score_units: int
    state_units: int
    # Rows of a head's state in one program, at most.
    block_p: int = 64


# By the bytes of an input and whether d_state is above 128. All fit into the 99 KiB of shared
# memory that a block can have on the GPUs with least of it.
TUNING: Final = {
    (2, False): Tuning(64, 4, 2, 4, 3, 4, 3, 4, 2, 16, 16),
    (2, True): Tuning(32, 8, 2, 8, 2, 8, 1, 8, 1, 16, 16),
    (4, False): Tuning(16, 8, 1, 8, 1, 8, 1, 8, 1, 16, 16),
    (4, True): Tuning(16, 8, 1, 8, 1, 8, 1, 8, 1, 16, 16, block_p=32),
}
_SHORTEST_CHUNK: Final = 16
# Two for each of an H100's 132 multiprocessors. With fewer programs a sequence is cut into
# segments, which are carried over at once from zero states and again from the right ones.
_PROGRAMS: Final = 264
_SHORTEST_SEGMENT: Final = 4
# Of so many rows at a time does the backward write down the chunks' states.
_STATES_BYTES: Final = 320 * 2**20
_PASS_BLOCK: Final = 1024
# Heads, side by side in dt, of one program that prepares or finishes steps.
_HEADS: Final = 16

_States = tuple[Tensor | None, Tensor | None]
_NO_STATES: Final = None, None


@dataclass(frozen=True)
class _Problem:
    """The inputs of some rows, what `prepare_steps` made of them, and how the work is cut."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    steps: Tensor
    decays: Tensor
    numbers: Tensor | None
    tuning: Tuning
    chunk: int

    @property
    def chunks(self) -> int:
        return self.steps.shape[2] // self.chunk

    @property
    def block_p(self) -> int:
        return min(self.tuning.block_p, _power_of_two(self.x.shape[3]))

    @property
    def blocks(self) -> int:
        return _ceiling(self.x.shape[3], self.block_p)

    @property
    def block_n(self) -> int:
        return _power_of_two(self.B.shape[3])

    @property
    def per_group(self) -> int:
        return self.x.shape[2] // self.B.shape[2]

    @property
    def segment_chunks(self) -> int:
        """Chunks of one program that carries a state."""
        batch, _, heads, _ = self.x.shape
        wanted = max(1, _PROGRAMS // (batch * heads * self.blocks))
        return min(self.chunks, max(_SHORTEST_SEGMENT, _ceiling(self.chunks, wanted)))

    @property
    def segments(self) -> int:
        return _ceiling(self.chunks, self.segment_chunks)

    @property
    def options(self) -> dict[str, int | str | bool]:
        """What every kernel with matrix products is compiled for."""
        return {
            "P": self.x.shape[3],
            "N": self.B.shape[3],
            "HAS_DOCUMENTS": self.numbers is not None,
            "Q": self.chunk,
            "BLOCK_P": self.block_p,
            "BLOCK_N": self.block_n,
            "HALF": self.x.dtype == torch.bfloat16,
            # Three TF32 products give fp32's precision back; "ieee" would be scalar code.
            "PRECISION": "tf32x3" if self.x.dtype == torch.float32 else "tf32",
        }


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
    problem = _prepare(x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus, chunk_size)
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
    `grad_y` (B, L, H, P) is in x's dtype, with a unit stride of P; an empty gradient is not wanted.
    """
    per_position = gradients[0], gradients[1], gradients[3], gradients[4]
    grad_initial = gradients[7] if initial_state is not None else None
    sums = []
    for rows in _row_slices(x, B, chunk_size):

        def of_rows(tensor: Tensor | None, rows: slice = rows) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        problem = _prepare(
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


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> _Problem:
    batch, length, heads, _ = x.shape
    tuning, chunk = _cut(x, B, chunk_size)
    chunks = _ceiling(length, chunk)
    steps = A.new_empty(batch, heads, chunks * chunk)
    # fp32 differences of fp32's precision, against bf16's of the scores that they scale.
    decays = torch.empty_like(
        steps, dtype=torch.float64 if x.dtype == torch.float32 else torch.float32
    )
    numbers = None if seq_idx is None else seq_idx.new_empty(batch, chunks * chunk)
    triton_forward.prepare_steps[(chunks, _ceiling(heads, _HEADS), batch)](
        *(dt, dt_bias, A, seq_idx, steps, decays, numbers, length, heads, chunks * chunk),
        *dt.stride(),
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus,
        HAS_DOCUMENTS=seq_idx is not None,
        Q=chunk,
        HEADS=_HEADS,
        num_warps=8,
    )
    return _Problem(x, dt, A, B, C, D, dt_bias, dt_softplus, steps, decays, numbers, tuning, chunk)


def _segment_starts(
    problem: _Problem, inputs: tuple[Tensor, Tensor], initial: Tensor | None, *, reverse: bool
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
    triton_forward.pass_states[(_ceiling(size, _PASS_BLOCK), batch * heads)](
        *(local, initial, starts, problem.decays, problem.numbers),
        *(heads, problem.chunks, segments, problem.segment_chunks, size),
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        HAS_DOCUMENTS=problem.numbers is not None,
        Q=problem.chunk,
        BLOCK=_PASS_BLOCK,
    )
    return starts


def _new_chunk_states(problem: _Problem) -> _States:
    """Room for (B, H, blocks, chunks, BLOCK_P, BLOCK_N): fp32, or fp16 over scales (..., 2)."""
    chunks = *problem.steps.shape[:2], problem.blocks, problem.chunks
    shape = *chunks, problem.block_p, problem.block_n
    if problem.x.dtype == torch.float32:
        return problem.steps.new_empty(shape), None
    states = problem.steps.new_empty(shape, dtype=torch.float16)
    return states, problem.steps.new_empty(*chunks, 2)


def _scan(
    problem: _Problem,
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
        num_stages=problem.tuning.scan_stages,
        **problem.options,
    )


def _carry(
    problem: _Problem,
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
    problem: _Problem,
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
    score_splits, state_splits = _ceiling(units, of_scores), _ceiling(units, of_states)
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
    problem: _Problem, by_position: Tensor, by_chunk: Tensor, grad_dt: Tensor
) -> Tensor:
    batch, length, heads, _ = problem.x.shape
    sums = by_chunk.new_empty(3, batch, heads, problem.chunks)
    triton_backward.finish_steps[(problem.chunks, _ceiling(heads, _HEADS), batch)](
        *(problem.dt, problem.dt_bias, problem.A, problem.steps, problem.numbers),
        *(by_position, by_chunk, grad_dt, sums, length, heads, problem.blocks, problem.chunks),
        *(by_position[0].numel(), sums[0].numel(), *problem.dt.stride(), *grad_dt.stride()[:2]),
        HAS_BIAS=problem.dt_bias is not None,
        SOFTPLUS=problem.dt_softplus,
        HAS_DOCUMENTS=problem.numbers is not None,
        Q=problem.chunk,
        HEADS=_HEADS,
        num_warps=2,
    )
    return sums.sum((1, 3))


def _per_program(units: int, programs: int, most: int) -> int:
    """Heads, or blocks of them, of one program: fewer where there would be too few programs."""
    return max(1, min(most, units * programs // _PROGRAMS, units))


def _cut(x: Tensor, B: Tensor, chunk_size: int) -> tuple[Tuning, int]:
    """The tuning, and the chunk: no longer than `chunk_size` where that is at least 16."""
    tuning = TUNING[x.element_size(), B.shape[3] > 128]
    chunk = tuning.chunk
    while chunk > max(chunk_size, _SHORTEST_CHUNK):
        chunk //= 2
    return tuning, chunk


def _row_slices(x: Tensor, B: Tensor, chunk_size: int) -> list[slice]:
    """Rows in parts of about one size, whose states at the chunks fit in `_STATES_BYTES`."""
    batch, length, heads, headdim = x.shape
    tuning, chunk = _cut(x, B, chunk_size)
    padded = _ceiling(headdim, tuning.block_p) * tuning.block_p * _power_of_two(B.shape[3])
    row_bytes = 2 * heads * _ceiling(length, chunk) * padded * x.element_size()
    parts = _ceiling(batch, max(1, _STATES_BYTES // row_bytes))
    rows = _ceiling(batch, parts)
    return [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]


def _power_of_two(size: int) -> int:
    """The least power of two, from 16 on, that tensor cores' tiles of `size` fit in."""
    return max(16, 1 << (size - 1).bit_length())


def _ceiling(value: int, divisor: int) -> int:
    return -(-value // divisor)
