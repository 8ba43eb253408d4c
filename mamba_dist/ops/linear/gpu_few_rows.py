"""Products of a few rows of bf16 on a GPU, by a kernel of our own.

A row or a few are what decoding has. The product then is the reading of its weights, which a kernel
made for that asks for in one go, and without a second one for what several blocks add up.

I input features, O output features.
"""

import ctypes
import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.native.call import is_unobserved, pointer
from mamba_dist.ops.nvrtc.kernel import call_fields, launch, specialised

_SOURCE: Final = Path(__file__).with_name("gpu_few_rows.cu")
_MOST_ROWS: Final = 4
# Elements that are read at once, and their bytes.
_PIECE: Final = 8
_PIECE_BYTES: Final = 16
_WARP: Final = 32
_THREADS: Final = 256
_BLOCKS_PER_SM: Final = 4
# Threads with which a large GPU has enough weights on their way.
_THREADS_WANTED: Final = 132 * 960
# Of an output; the fewest pieces for each of them that are worth another warp.
_FEWEST_PIECES: Final = 2


class _Call(ctypes.Structure):
    """`Call` of gpu_few_rows.cu."""

    _fields_ = call_fields(("x", "weight", "bias", "y"), ("x_row",))


def product_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, (rows, O) bf16, added up in fp32.

    Args:
        x: (rows, I) bf16, 1 to 4 rows at multiples of 16 bytes, I a multiple of 8.
        weight: (O, I) bf16, contiguous.
        bias: (O,) bf16.

    Raises:
        BackendError: the kernel cannot be compiled or run here.
    """
    (rows, inputs), outputs = x.shape, len(weight)
    team = _team(inputs // _PIECE, outputs)
    y = x.new_empty(rows, outputs)
    kernel = specialised(
        _SOURCE,
        "linear_few_rows",
        threads=_THREADS,
        blocks_per_sm=_BLOCKS_PER_SM,
        INPUTS=inputs,
        OUTPUTS=outputs,
        ROWS=rows,
        TEAM=team,
        BIAS=bias is not None,
    )
    launch(
        kernel,
        _Call(*map(pointer, (x, weight, bias, y)), x.stride(0)),
        blocks=-(-outputs // (_THREADS // team)),
        # A sum of each warp and row.
        shared_bytes=4 * rows * (_THREADS // _WARP),
        device=x.device,
    )
    return y


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x as (rows, I) where the kernel can compute the product, None where torch has to."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # Autograd and autocast know torch's product only, and so do compilers and modes.
    if not is_unobserved(*tensors) or not _is_few(x, weight, bias):
        return None
    kind = x.device.type
    if (
        any(tensor.dtype != torch.bfloat16 or tensor.device != x.device for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype)
    ):
        return None
    rows = x.reshape(-1, weight.shape[1])
    in_steps = rows.stride(1) == 1 and (len(rows) == 1 or rows.stride(0) % _PIECE == 0)
    is_aligned = all(tensor.data_ptr() % _PIECE_BYTES == 0 for tensor in (rows, weight))
    whole = weight.is_contiguous() and (bias is None or bias.is_contiguous())
    return rows if in_steps and is_aligned and whole else None


def _is_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are those of a few rows; wrong ones are torch's to report."""
    if weight.dim() != 2 or 0 in weight.shape or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return weight.shape[1] % _PIECE == 0 and 1 <= math.prod(x.shape[:-1]) <= _MOST_ROWS


def _team(pieces: int, outputs: int) -> int:
    """Threads of an output: a warp at most if there are many outputs."""
    team = min(_WARP, 1 << (pieces.bit_length() - 1))
    while (
        team < _THREADS and outputs * team < _THREADS_WANTED and pieces >= 2 * _FEWEST_PIECES * team
    ):
        team *= 2
    return team
