"""The head's cross entropy on a GPU: cuBLAS' products, and one CUDA kernel between them.

As in `torch_chunked.py` the forward computes the gradients too, some tokens at a time. One buffer
holds a chunk's logits, in the products' dtype; the kernel puts their gradient in their place.

T tokens, D d_model, V rows of the head, P the next multiple of 64.
"""

import ctypes
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.cross_entropy.torch_chunked import (
    LossAndGradients,
    add_product,
    differentiable,
    matmul_dtype,
)
from mamba_dist.ops.nvrtc.compiler import USE_TORCH
from mamba_dist.ops.nvrtc.kernel import call_fields, launch, specialised

_SOURCE: Final = Path(__file__).with_name("gpu_softmax.cu")
# Columns of the products: their tiles are whole, and the kernel's rows aligned.
_COLUMN_STEP: Final = 64
# 5,000 tokens of a vocabulary of 50,000 in bf16; with thousands of rows a product is at its best.
_LOGITS_BYTES: Final = 1 << 29
_TOKEN_STEP: Final = 128
_MOST_THREADS: Final = 512
_THREADS_PER_MULTIPROCESSOR: Final = 1024
_WARP: Final = 32
# Bytes of logits that each thread asks for at once.
_HELD_BYTES: Final = 64


class _Call(ctypes.Structure):
    """`Call` of gpu_softmax.cu."""

    _fields_ = call_fields(("logits", "labels", "losses"), ("rows", "columns", "vocabulary"))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Scalar sum of -log p over labels other than -100; arguments as in the package.

    The products are in bf16 or fp32, fp16 goes through fp32. A label that is no row of the head
    makes the loss NaN: to find it earlier the host would have to wait for the device.

    Raises:
        BackendError: an input is fp64, or the kernel cannot be compiled or run here.
    """
    dtype = matmul_dtype(hidden, weight)
    if dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no fp64 linear_cross_entropy; {USE_TORCH}")
    if dtype != torch.bfloat16:
        dtype = torch.float32
    return differentiable(hidden, weight, labels, partial(_forward, vocab_size, dtype))


def _forward(
    vocab_size: int,
    dtype: torch.dtype,
    tokens: Tensor,
    weight: Tensor,
    targets: Tensor,
    wanted: tuple[bool, bool],
) -> LossAndGradients:
    head = _padded_head(weight, vocab_size, dtype)
    inputs, targets = tokens.to(dtype), targets.contiguous()
    losses = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    # A product has been rounded to its dtype anyway.
    kept = dtype if tokens.dtype == dtype else torch.float32
    grad_tokens = torch.empty_like(tokens, dtype=kept) if wanted[0] else None
    grad_head = torch.empty_like(head, dtype=torch.float32) if wanted[1] else None
    chunk = _chunk_tokens(len(tokens), len(head) * dtype.itemsize)
    buffer = inputs.new_empty(min(chunk, len(tokens)), len(head))
    for start in range(0, len(tokens), chunk):
        where = slice(start, start + chunk)
        logits = buffer[: len(losses[where])]
        torch.mm(inputs[where], head.t(), out=logits)
        _softmax_loss(logits, targets[where], losses[where], vocab_size, any(wanted))
        if grad_tokens is not None:
            grad_tokens[where] = logits @ head
        if grad_head is not None:
            add_product(grad_head, logits, inputs[where], is_first=start == 0)
    if grad_head is not None:
        # Products have left zeros there, but NaN where a token's logits were NaN.
        grad_head[vocab_size:].zero_()
    # fp64 makes the sum independent of how tokens fall into chunks.
    loss = losses.sum(dtype=torch.float64).float()
    return loss, grad_tokens, None if grad_head is None else grad_head[: len(weight)]


def _padded_head(weight: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """(P, D): the head's rows that take part in the softmax, then zeros."""
    rows = -(-len(weight) // _COLUMN_STEP) * _COLUMN_STEP
    head = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    head[:vocab_size] = weight[:vocab_size]
    head[vocab_size:] = 0
    return head


def _chunk_tokens(tokens: int, row_bytes: int) -> int:
    """Chunks as even as they can be, of at most _LOGITS_BYTES of logits."""
    most = max(_TOKEN_STEP, _LOGITS_BYTES // row_bytes // _TOKEN_STEP * _TOKEN_STEP)
    chunks = -(-tokens // most)
    return -(-tokens // chunks // _TOKEN_STEP) * _TOKEN_STEP


def _softmax_loss(
    logits: Tensor, targets: Tensor, losses: Tensor, vocab_size: int, wanted: bool
) -> None:
    """Writes `losses` (t,) of `logits` (t, P), which become their gradient if that is wanted."""
    rows, columns = logits.shape
    held = _HELD_BYTES // (4 * logits.element_size())
    warps = -(-columns // (4 * held * _WARP))
    threads = min(_MOST_THREADS, _WARP * warps)
    kernel = specialised(
        _SOURCE,
        "softmax_loss",
        threads=threads,
        blocks_per_sm=max(1, _THREADS_PER_MULTIPROCESSOR // threads),
        HELD=held,
        STORAGE_BF16=logits.dtype == torch.bfloat16,
        GRADIENT=wanted,
    )
    call = _Call(
        *(logits.data_ptr(), targets.data_ptr(), losses.data_ptr()), rows, columns, vocab_size
    )
    # Two sets of a float per warp, for the two reductions.
    shared_bytes = 2 * 4 * (threads // _WARP)
    launch(kernel, call, blocks=rows, shared_bytes=shared_bytes, device=logits.device)
