"""Residual add and RMSNorm by the native kernels of `cpu.cpp`: one operator each way.

The backward needs the stream only, which the next layer keeps anyway.

D width of the stream.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.ops.native.call import STORAGE, refuse_tangents
from mamba_dist.ops.native.library import checked_kernel

SOURCE: Final = Path(__file__).with_name("cpu.cpp")
# Rows whose shares of the weight's gradient are added up apart: by shape, not by threads.
_LEAST_TILE_ROWS: Final = 16
_MOST_TILES: Final = 128
# With less work than this a further thread costs more than it takes over.
_ELEMENTS_PER_THREAD: Final = 1 << 14


class _Arguments(ctypes.Structure):
    """`Arguments` of cpu.cpp, which says what each field is."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "residual", "weight", "grad_normed", "grad_stream", "normed", "stream"),
                *("grad_residual", "grad_x", "grad_weight", "shares"),
            )
        ),
        ("eps", ctypes.c_double),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "width", "tile_rows", "x_storage", "normed_storage", "threads")
        ),
    )


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normed (..., D) in `output_dtype` and the stream in weight's dtype.

    Arguments and shapes are those of `mamba_dist.ops.rms_norm.add_rms_norm`.

    Raises:
        BackendError: the kernels cannot be compiled or loaded.
    """
    refuse_tangents("add_rms_norm", x, residual, weight)
    dtype = weight.dtype
    if dtype == torch.float64 or x.dtype not in STORAGE:
        x = x.to(dtype)
    stored = output_dtype if dtype == torch.float32 and output_dtype in STORAGE else dtype
    if stored == torch.float64:
        stored = dtype
    normed, stream = _forward(x, residual, weight, eps, stored)
    return normed.to(output_dtype), x if _is_stream(x, residual, weight) else stream


def _is_stream(x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    """Whether the new stream is x itself, which an operator may not return."""
    return residual is None and x.dtype == weight.dtype


@torch.library.custom_op("mamba_dist::add_rms_norm_cpu", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normed, and the stream, which is empty if it is x."""
    normed, stream = _forward_outputs(x, residual, weight, output_dtype)
    _run(
        "forward",
        eps,
        {
            "x": x.contiguous(),
            "residual": None if residual is None else residual.contiguous(),
            "weight": weight.contiguous(),
            "normed": normed,
            "stream": None if _is_stream(x, residual, weight) else stream,
        },
        x_dtype=x.dtype,
        normed_dtype=output_dtype,
    )
    return normed, stream


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(x, residual, weight, output_dtype)


@torch.library.custom_op(
    "mamba_dist::add_rms_norm_cpu_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, x and weight; that of x is empty where it equals the residual's."""
    grads = _backward_outputs(stream, weight, x_dtype)
    grad_residual, grad_x, grad_weight = grads
    rows = stream.numel() // stream.shape[-1]
    _run(
        "backward",
        eps,
        {
            "stream": stream.contiguous(),
            "weight": weight.contiguous(),
            "grad_normed": grad_normed.contiguous(),
            "grad_stream": None if grad_stream is None else grad_stream.contiguous(),
            "grad_residual": grad_residual,
            "grad_x": None if x_dtype == stream.dtype else grad_x,
            "grad_weight": grad_weight,
            "shares": weight.new_empty(-(-rows // _tile_rows(rows)), len(weight)),
        },
        x_dtype=x_dtype,
        normed_dtype=grad_normed.dtype,
    )
    return grads


@_backward.register_fake
def _(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(stream, weight, x_dtype)


def _keep_stream(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, eps, output_dtype = inputs
    stream = x if _is_stream(x, residual, weight) else output[1]
    ctx.save_for_backward(stream, weight)
    ctx.eps, ctx.x_dtype, ctx.output_dtype = eps, x.dtype, output_dtype
    ctx.has_residual, ctx.stream_is_x = residual is not None, stream is x
    # The last norm's stream goes nowhere: a tensor of zeros would be written and added for nothing.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, weight = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = stream.new_zeros(stream.shape, dtype=ctx.output_dtype)
    grad_residual, grad_x, grad_weight = _backward(
        grad_normed,
        None if ctx.stream_is_x else grad_stream,
        stream,
        weight,
        ctx.eps,
        ctx.x_dtype,
    )
    if ctx.x_dtype == stream.dtype:
        grad_x = grad_residual
    return grad_x, grad_residual if ctx.has_residual else None, grad_weight, None, None


_forward.register_autograd(_differentiate, setup_context=_keep_stream)


def _run(
    kernel: str,
    eps: float,
    tensors: dict[str, Tensor | None],
    *,
    x_dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> None:
    """Calls the kernel on contiguous tensors, passed by the fields' names."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    stream = given.get("x", given.get("stream"))
    assert stream is not None
    rows = stream.numel() // stream.shape[-1]
    arguments = _Arguments(
        eps=eps,
        rows=rows,
        width=stream.shape[-1],
        tile_rows=_tile_rows(rows),
        x_storage=STORAGE[x_dtype],
        normed_storage=STORAGE[normed_dtype],
        threads=max(1, min(torch.get_num_threads(), stream.numel() // _ELEMENTS_PER_THREAD)),
        **{name: tensor.data_ptr() for name, tensor in given.items()},
    )
    getattr(_library(), f"rms_norm_{kernel}")(ctypes.byref(arguments))


@functools.cache
def _library() -> ctypes.CDLL:
    return checked_kernel(SOURCE, rms_norm_arguments_bytes=ctypes.sizeof(_Arguments))


def _tile_rows(rows: int) -> int:
    return max(_LEAST_TILE_ROWS, -(-rows // _MOST_TILES))


def _forward_outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (0,) if _is_stream(x, residual, weight) else x.shape
    return x.new_empty(x.shape, dtype=output_dtype), weight.new_empty(shape)


def _backward_outputs(
    stream: Tensor, weight: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (0,) if x_dtype == stream.dtype else stream.shape
    return (
        stream.new_empty(stream.shape),
        stream.new_empty(shape, dtype=x_dtype),
        weight.new_empty(weight.shape),
    )
