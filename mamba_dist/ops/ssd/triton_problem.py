# mypy: allow-untyped-calls
"""How the SSD scan's work is cut for the Triton kernels, and what is prepared for all of them.

B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk.
"""

import functools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.ssd import triton_forward


@dataclass(frozen=True)
class Tuning:
    """What the kernels are compiled and launched with; only the last bits depend on it."""

    chunk: int
    scan_warps: int
    scan_stages: int
    # From the end, with the states written down.
    reverse_stages: int
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
    (2, False): Tuning(64, 4, 2, 1, 4, 3, 4, 3, 4, 2, 16, 16),
    (2, True): Tuning(32, 8, 2, 2, 8, 2, 8, 1, 8, 1, 16, 16),
    (4, False): Tuning(16, 8, 1, 1, 8, 1, 8, 1, 8, 1, 16, 16),
    (4, True): Tuning(16, 8, 1, 1, 8, 1, 8, 1, 8, 1, 16, 16, block_p=32),
}
_SHORTEST_CHUNK: Final = 16
# Two for each of an H100's 132 multiprocessors. With fewer programs a sequence is cut into
# segments, which are carried over at once from zero states and again from the right ones.
PROGRAMS: Final = 264
_SHORTEST_SEGMENT: Final = 4
# Of so many rows at a time does the backward write down the chunks' states.
_STATES_BYTES: Final = 320 * 2**20
# Heads, side by side in dt, of one program that prepares or finishes steps.
HEADS: Final = 16


@dataclass(frozen=True)
class Problem:
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

    @functools.cached_property
    def chunks(self) -> int:
        return self.steps.shape[2] // self.chunk

    @functools.cached_property
    def block_p(self) -> int:
        return min(self.tuning.block_p, power_of_two(self.x.shape[3]))

    @functools.cached_property
    def blocks(self) -> int:
        return ceiling(self.x.shape[3], self.block_p)

    @functools.cached_property
    def block_n(self) -> int:
        return power_of_two(self.B.shape[3])

    @functools.cached_property
    def per_group(self) -> int:
        return self.x.shape[2] // self.B.shape[2]

    @functools.cached_property
    def segment_chunks(self) -> int:
        """Chunks of one program that carries a state."""
        batch, _, heads, _ = self.x.shape
        wanted = max(1, PROGRAMS // (batch * heads * self.blocks))
        return min(self.chunks, max(_SHORTEST_SEGMENT, ceiling(self.chunks, wanted)))

    @functools.cached_property
    def segments(self) -> int:
        return ceiling(self.chunks, self.segment_chunks)

    @functools.cached_property
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


def prepare(
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
) -> Problem:
    """The problem of these rows, after queueing the kernel that fills its steps and decays."""
    batch, length, heads, _ = x.shape
    tuning, chunk = _cut(x, B, chunk_size)
    chunks = ceiling(length, chunk)
    steps = A.new_empty(batch, heads, chunks * chunk)
    # fp32 differences of fp32's precision, against bf16's of the scores that they scale.
    decays = torch.empty_like(
        steps, dtype=torch.float64 if x.dtype == torch.float32 else torch.float32
    )
    numbers = None if seq_idx is None else seq_idx.new_empty(batch, chunks * chunk)
    triton_forward.prepare_steps[(chunks, ceiling(heads, HEADS), batch)](
        *(dt, dt_bias, A, seq_idx, steps, decays, numbers, length, heads, chunks * chunk),
        *dt.stride(),
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus,
        HAS_DOCUMENTS=seq_idx is not None,
        Q=chunk,
        HEADS=HEADS,
        num_warps=8,
    )
    return Problem(x, dt, A, B, C, D, dt_bias, dt_softplus, steps, decays, numbers, tuning, chunk)


def _cut(x: Tensor, B: Tensor, chunk_size: int) -> tuple[Tuning, int]:
    """The tuning, and the chunk: no longer than `chunk_size` where that is at least 16."""
    tuning = TUNING[x.element_size(), B.shape[3] > 128]
    chunk = tuning.chunk
    while chunk > max(chunk_size, _SHORTEST_CHUNK):
        chunk //= 2
    return tuning, chunk


def row_slices(x: Tensor, B: Tensor, chunk_size: int) -> list[slice]:
    """Rows in parts of about one size, whose states at the chunks fit in `_STATES_BYTES`."""
    batch, length, heads, headdim = x.shape
    tuning, chunk = _cut(x, B, chunk_size)
    padded = ceiling(headdim, tuning.block_p) * tuning.block_p * power_of_two(B.shape[3])
    row_bytes = 2 * heads * ceiling(length, chunk) * padded * x.element_size()
    parts = ceiling(batch, max(1, _STATES_BYTES // row_bytes))
    rows = ceiling(batch, parts)
    return [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]


def power_of_two(size: int) -> int:
    """The least power of two, from 16 on, that tensor cores' tiles of `size` fit in."""
    return max(16, 1 << (size - 1).bit_length())


def ceiling(value: int, divisor: int) -> int:
    return -(-value // divisor)
