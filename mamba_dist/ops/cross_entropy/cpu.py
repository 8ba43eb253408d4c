"""The head's cross entropy on the CPU: PyTorch's chunks, a native softmax, the fastest products.

T tokens, V vocabulary.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.cross_entropy.torch_chunked import Pieces, chunked
from mamba_dist.ops.linear import cpu as linear_cpu
from mamba_dist.ops.native.library import checked_kernel
from mamba_dist.ops.precision import compute_dtype

SOURCE: Final = Path(__file__).with_name("cpu.cpp")
_SUFFIXES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}


class _Arguments(ctypes.Structure):
    """The struct of the same name in cpu.cpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("gradient", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Scalar sum of -log p over labels other than -100; arguments as in the package."""
    pieces = Pieces(linear_cpu.product_dtype, linear_cpu.product, _softmax_loss)
    return chunked(hidden, weight, labels, vocab_size, pieces)


def _softmax_loss(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    if logits.dtype not in _SUFFIXES:
        logits = logits.to(compute_dtype(logits))
    return softmax_loss(logits, targets.contiguous(), wanted), logits


@torch.library.custom_op("mamba_dist::softmax_loss", mutates_args=("logits",))
def softmax_loss(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """Losses (T,) in fp32 or fp64; `logits` (T, V) become their gradient if that is wanted.

    Raises:
        IndexError: a label other than -100 is not a row of the head.
    """
    losses = torch.empty(len(logits), dtype=compute_dtype(logits))
    arguments = _Arguments(
        logits.data_ptr(),
        labels.data_ptr(),
        losses.data_ptr(),
        *logits.shape,
        logits.stride(0),
        gradient,
        torch.get_num_threads(),
    )
    wrong = getattr(_library(), f"softmax_loss_{_SUFFIXES[logits.dtype]}")(ctypes.byref(arguments))
    if wrong >= 0:
        raise IndexError(
            f"label {int(labels[wrong])} is outside the vocabulary of {logits.shape[1]} ids"
        )
    return losses


@softmax_loss.register_fake
def _softmax_loss_fake(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=compute_dtype(logits))


@cache
def _library() -> ctypes.CDLL:
    library = checked_kernel(SOURCE, softmax_loss_arguments_bytes=ctypes.sizeof(_Arguments))
    for suffix in _SUFFIXES.values():
        getattr(library, f"softmax_loss_{suffix}").restype = ctypes.c_int64
    return library
