"""How kernels that reduce rows are laid out: `rows.cuh` has the device's half of this."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.native.call import unit_stride
from mamba_dist.ops.nvrtc.kernel import Kernel, specialised

STORAGE: Final = (torch.bfloat16, torch.float32)
"""The dtypes that the kernels read and write; others go through fp32."""
FORWARD_THREADS: Final = 1024
"""Threads of one multiprocessor, which leave 64 registers to each."""
BACKWARD_THREADS: Final = 512
"""As many, which leave 128."""

# What the kernels read or write at once.
_ELEMENTS: Final = 4
_WARP: Final = 32
_SMALLEST_BLOCK_WARPS: Final = 4
# Elements of a row that a thread keeps in registers are this many fours at most.
_MOST_HELD: Final = 4
_MOST_TEAM_WARPS: Final = 16
# Whatever GPU it is: how rows fall into blocks decides in which order gradients are added up.
_MULTIPROCESSORS: Final = 132


@dataclass(frozen=True)
class RowLayout:
    """Who works on rows of `width` elements.

    team: threads of a row.
    teams: rows of a block at a time.
    held: fours that each thread keeps in registers.
    tiles: how many times that a row has, 1 for all but very wide ones.
    """

    width: int
    team: int
    teams: int
    held: int
    tiles: int

    @functools.cached_property
    def threads(self) -> int:
        """Threads of a block."""
        return self.team * self.teams

    @property
    def shared_bytes(self) -> int:
        """Two sets of a float per warp, for the reductions."""
        return 2 * 4 * (self.threads // _WARP)

    @functools.cached_property
    def macros(self) -> dict[str, bool | int]:
        """What rows.cuh wants to know, and WIDE."""
        whole = self.width % _ELEMENTS == 0
        return {"TEAM": self.team, "HELD": self.held, "WHOLE": whole, "WIDE": self.tiles > 1}

    def kernel(self, source: Path, name: str, resident_threads: int, **macros: bool) -> Kernel:
        """The entry point `name` for this layout, with registers for so many threads."""
        return specialised(
            source,
            name,
            threads=self.threads,
            blocks_per_sm=max(1, resident_threads // self.threads),
            **self.macros,
            **macros,
        )

    def blocks(self, rows: int, resident_threads: int) -> int:
        """How many, each with as many rows as any other, fill a large GPU once at most."""
        most = _MULTIPROCESSORS * max(1, resident_threads // self.threads)
        rounds = -(-rows // self.teams)
        return -(-rounds // -(-rounds // most))


@functools.cache
def row_layout(width: int) -> RowLayout:
    """The layout for rows of `width` elements."""
    fours = -(-width // _ELEMENTS)
    warps = min(_MOST_TEAM_WARPS, -(-fours // (_WARP * _MOST_HELD)))
    held = min(_MOST_HELD, -(-fours // (_WARP * warps)))
    tiles = -(-fours // (_WARP * warps * held))
    return RowLayout(width, _WARP * warps, max(1, _SMALLEST_BLOCK_WARPS // warps), held, tiles)


def rows_of(tensor: Tensor, width: int) -> Tensor:
    """(rows, D), a view where the kernels can read that in place.

    `width` is that of the parts that a row is read in: D, or less if it has groups.
    """
    rows = unit_stride(tensor).reshape(-1, tensor.shape[-1])
    if width % _ELEMENTS:
        return rows
    fits = rows.stride(0) % _ELEMENTS == 0 and _is_aligned(rows)
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)


def aligned(vector: Tensor) -> Tensor:
    """The tensor, contiguous and where the kernels can read four elements at a time."""
    vector = vector.contiguous()
    return vector if _is_aligned(vector) else vector.clone()


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % (_ELEMENTS * tensor.element_size()) == 0
