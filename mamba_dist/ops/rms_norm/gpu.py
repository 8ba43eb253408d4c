"""Residual add and RMSNorm on our own CUDA kernels: one that reads each row once, either way.

D width of the stream; the leading dimensions are one here.
"""

import ctypes
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.native.call import pointer, refuse_tangents
from mamba_dist.ops.nvrtc.compiler import USE_TORCH
from mamba_dist.ops.nvrtc.kernel import call_fields, launch
from mamba_dist.ops.nvrtc.rows import (
    BACKWARD_THREADS,
    FORWARD_THREADS,
    STORAGE,
    aligned,
    row_layout,
    rows_of,
)

_FORWARD: Final = Path(__file__).with_name("gpu_forward.cu")
_BACKWARD: Final = Path(__file__).with_name("gpu_backward.cu")


class _ForwardCall(ctypes.Structure):
    """`Call` of gpu_forward.cu."""

    _fields_ = call_fields(
        ("x", "residual", "weight", "normed", "stream", "reciprocal_rms"),
        ("x_row", "residual_row", "rows", "width", "blocks"),
        ("eps",),
    )


class _BackwardCall(ctypes.Structure):
    """`Call` of gpu_backward.cu."""

    _fields_ = call_fields(
        (
            *("grad_normed", "grad_stream", "stream", "reciprocal_rms", "weight"),
            *("grad_fp32", "grad_bf16", "grad_weight"),
        ),
        ("grad_normed_row", "grad_stream_row", "stream_row", "rows", "width", "blocks"),
    )


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normed (..., D) in `output_dtype` and the stream in fp32.

    Arguments and shapes are those of `mamba_dist.ops.rms_norm.add_rms_norm`. bf16 and fp32 are read
    and written as they are, anything else through fp32.

    Raises:
        BackendError: x or the residual is fp64, or the kernels cannot be compiled or run here.
    """
    if weight.dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no fp64 add_rms_norm; {USE_TORCH}")
    refuse_tangents("add_rms_norm", x, residual, weight)
    if x.dtype not in STORAGE:
        x = x.float()
    stored = output_dtype if output_dtype in STORAGE else torch.float32
    normed, stream = _AddRMSNorm.apply(x, residual, weight, eps, stored)  # type: ignore[no-untyped-call]
    return normed.to(output_dtype), x if stream is None else stream


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        normed_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Normed, and the stream, which is None if it is x itself."""
        normed, stream, reciprocal_rms = _run_forward(x, residual, weight, eps, normed_dtype)
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(x if stream is None else stream, weight, reciprocal_rms)
        # The last norm's stream goes nowhere: zeros would be written and added for nothing.
        ctx.set_materialize_grads(False)
        return normed, stream

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, weight, reciprocal_rms = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(stream)
        in_fp32 = ctx.needs_input_grad[1] or ctx.x_dtype == torch.float32
        in_bf16 = ctx.needs_input_grad[0] and ctx.x_dtype == torch.bfloat16
        grad_fp32, grad_bf16, grad_weight = _run_backward(
            (grad_normed, grad_stream), (stream, weight, reciprocal_rms), in_fp32, in_bf16
        )
        grad_x = grad_bf16 if ctx.x_dtype == torch.bfloat16 else grad_fp32
        return grad_x, grad_fp32 if ctx.needs_input_grad[1] else None, grad_weight, None, None


def _run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normed, the stream unless it is x, and 1 / rms of each row (rows,)."""
    layout = row_layout(len(weight))
    rows, weight = rows_of(x, layout.width), aligned(weight)
    before = None if residual is None else rows_of(residual, layout.width)
    writes_stream = residual is not None or x.dtype != torch.float32
    normed = x.new_empty(x.shape, dtype=normed_dtype)
    stream = weight.new_empty(x.shape) if writes_stream else None
    reciprocal_rms = weight.new_empty(len(rows))
    blocks = layout.blocks(len(rows), FORWARD_THREADS)
    call = _ForwardCall(
        *map(pointer, (rows, before, weight, normed, stream, reciprocal_rms)),
        *(rows.stride(0), 0 if before is None else before.stride(0)),
        *(*rows.shape, blocks, eps),
    )
    kernel = layout.kernel(
        _FORWARD,
        "add_rms_norm_forward",
        FORWARD_THREADS,
        X_BF16=x.dtype == torch.bfloat16,
        NORMED_BF16=normed_dtype == torch.bfloat16,
        RESIDUAL=residual is not None,
        STREAM=writes_stream,
    )
    launch(kernel, call, blocks=blocks, shared_bytes=layout.shared_bytes, device=x.device)
    return normed, stream, reciprocal_rms


def _run_backward(
    output_gradients: tuple[Tensor, Tensor | None],
    kept: tuple[Tensor, Tensor, Tensor],
    in_fp32: bool,
    in_bf16: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradient of x and of the residual in one dtype, in both or neither; the weight's."""
    stream, weight, reciprocal_rms = kept
    layout = row_layout(len(weight))
    rows, weight = rows_of(stream, layout.width), aligned(weight)
    grad_normed = rows_of(output_gradients[0], layout.width)
    passed = output_gradients[1]
    grad_stream = None if passed is None else rows_of(passed, layout.width)
    grad_fp32 = weight.new_empty(stream.shape) if in_fp32 else None
    grad_bf16 = weight.new_empty(stream.shape, dtype=torch.bfloat16) if in_bf16 else None
    blocks = layout.blocks(len(rows), BACKWARD_THREADS)
    grad_weight = weight.new_empty(blocks * layout.teams, layout.width)
    gradients = (grad_fp32, grad_bf16, grad_weight)
    call = _BackwardCall(
        *map(pointer, (grad_normed, grad_stream, rows, reciprocal_rms, weight, *gradients)),
        grad_normed.stride(0),
        0 if grad_stream is None else grad_stream.stride(0),
        *(rows.stride(0), *rows.shape, blocks),
    )
    kernel = layout.kernel(
        _BACKWARD,
        "add_rms_norm_backward",
        BACKWARD_THREADS,
        NORMED_BF16=grad_normed.dtype == torch.bfloat16,
        GRAD_STREAM=grad_stream is not None,
        GRAD_FP32=in_fp32,
        GRAD_BF16=in_bf16,
    )
    launch(kernel, call, blocks=blocks, shared_bytes=layout.shared_bytes, device=stream.device)
    return grad_fp32, grad_bf16, grad_weight.sum(0)
