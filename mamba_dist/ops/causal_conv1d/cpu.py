"""Causal convolution by the native kernels of `cpu.cpp`: bias and SiLU fused, one pass each way.

The backward recomputes the convolution, so only the inputs are kept.

B batch, L length, E channels, K kernel width.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.ops.native.call import (
    STORAGE,
    may_skip_dispatch,
    pointer,
    refuse_tangents,
    unit_stride,
)
from mamba_dist.ops.native.library import checked_kernel
from mamba_dist.ops.precision import compute_dtype

# Steps of a unit of work: longer ones repeat less at their ends, shorter ones give many cores work
# in a short sequence. They decide how sums are grouped, so they follow the shape, not the threads.
_TILE_STEPS: Final = 64
_SHORT_TILE_STEPS: Final = 16
_SHORT_STEPS: Final = 512
# With less work than this a further thread costs more than it takes over.
_ELEMENTS_PER_THREAD: Final = 1 << 14

_POINTERS: Final = (
    *("x", "grad_y", "weight", "bias", "initial_state", "grad_final_state", "seq_idx"),
    *("y", "final_state", "grad_x", "grad_weight", "grad_bias", "grad_initial_state", "shares"),
)
_NUMBERS: Final = (
    *("batch", "length", "channels", "width"),
    *("x_batch_stride", "x_row_stride", "grad_y_batch_stride", "grad_y_row_stride"),
    *("seq_idx_bytes", "tile_steps", "share_channels", "silu", "storage", "threads"),
)


class _Arguments(ctypes.Structure):
    """`Arguments` of cpu.cpp, which says what each field is."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, L, E) in x's dtype and, if asked for, final state (B, E, K - 1) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.causal_conv1d.causal_conv1d`.

    Raises:
        BackendError: the kernels cannot be compiled or loaded.
    """
    refuse_tangents("causal_conv1d", x, weight, bias, initial_state)
    dtype = compute_dtype(x)
    is_decoding = x.shape[1] == 1 and not torch.is_grad_enabled()
    operator = _run_forward if is_decoding and may_skip_dispatch(x) else _forward
    y, final_state = operator(
        x if x.dtype in STORAGE else x.to(dtype),
        _as(weight, dtype),
        None if bias is None else _as(bias, dtype),
        seq_idx,
        None if initial_state is None else _as(initial_state, dtype),
        return_final_state,
        silu,
    )
    return _as(y, x.dtype), final_state if return_final_state else None


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A cast to the same dtype takes a microsecond, and decoding comes here for every token.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the final state, which is empty unless asked for."""
    inputs = _Inputs(x, weight, bias, seq_idx, initial_state)
    y = torch.empty(x.shape, dtype=x.dtype)
    final_state = weight.new_empty(_state_shape(x, weight) if return_final_state else 0)
    inputs.run(
        _library().causal_conv1d_forward,
        silu,
        y=y.data_ptr(),
        final_state=final_state.data_ptr() if return_final_state else None,
    )
    return y, final_state


_forward = torch.library.custom_op(
    "mamba_dist::causal_conv1d_cpu", _run_forward, mutates_args=(), device_types="cpu"
)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, weight.new_empty(_state_shape(x, weight) if return_final_state else (0,))


@torch.library.custom_op(
    "mamba_dist::causal_conv1d_cpu_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial state; empty for an input that was not given."""
    inputs = _Inputs(x, weight, bias, seq_idx, initial_state)
    grad_y = unit_stride(grad_y)
    grad_final_state = None if grad_final_state is None else grad_final_state.contiguous()
    grads = _new_gradients(x, weight, bias, initial_state)
    grad_x, grad_weight, grad_bias, grad_initial_state = grads
    batch, length, channels = x.shape
    tiles = -(-length // _tile_steps(x))
    # Rows of whole vectors, whatever the machine's are: at most 32 channels.
    share_channels = -(-channels // 32) * 32
    shares = weight.new_empty(batch * tiles, weight.shape[1] + 1, share_channels)
    inputs.run(
        _library().causal_conv1d_backward,
        silu,
        grad_y=grad_y.data_ptr(),
        grad_y_batch_stride=grad_y.stride(0),
        grad_y_row_stride=grad_y.stride(1),
        grad_final_state=pointer(grad_final_state),
        grad_x=grad_x.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=None if bias is None else grad_bias.data_ptr(),
        grad_initial_state=None if initial_state is None else grad_initial_state.data_ptr(),
        shares=shares.data_ptr(),
        share_channels=share_channels,
    )
    return grads


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(x, weight, bias, initial_state)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, seq_idx, initial_state, return_final_state, silu = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_state)
    ctx.return_final_state, ctx.silu = return_final_state, silu


def _differentiate(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Any, ...]:
    x, weight, bias, seq_idx, initial_state = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_initial_state = _backward(
        grad_y,
        grad_final_state if ctx.return_final_state else None,
        x,
        weight,
        bias,
        seq_idx,
        initial_state,
        ctx.silu,
    )
    return (
        grad_x,
        grad_weight,
        None if bias is None else grad_bias,
        None,
        None if initial_state is None else grad_initial_state,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_keep_inputs)


class _Inputs:
    """The inputs of both passes as the kernels want them, alive as long as their pointers are."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seq_idx: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        self.x = unit_stride(x)
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.seq_idx = None if seq_idx is None else seq_idx.contiguous()
        self.initial_state = None if initial_state is None else initial_state.contiguous()

    def run(self, kernel: Any, silu: bool, **outputs: int | None) -> None:
        """Calls the kernel on the inputs and on what else is passed by the fields' names."""
        batch, length, channels = self.x.shape
        threads = torch.get_num_threads()
        if threads > 1:
            threads = max(1, min(threads, self.x.numel() // _ELEMENTS_PER_THREAD))
        arguments = _Arguments(
            x=self.x.data_ptr(),
            weight=self.weight.data_ptr(),
            bias=pointer(self.bias),
            initial_state=pointer(self.initial_state),
            seq_idx=pointer(self.seq_idx),
            batch=batch,
            length=length,
            channels=channels,
            width=self.weight.shape[1],
            x_batch_stride=self.x.stride(0),
            x_row_stride=self.x.stride(1),
            seq_idx_bytes=0 if self.seq_idx is None else self.seq_idx.element_size(),
            tile_steps=_tile_steps(self.x),
            silu=silu,
            storage=STORAGE[self.x.dtype],
            threads=threads,
            **outputs,
        )
        if kernel(ctypes.byref(arguments)):
            raise MemoryError("not enough memory for the scratch of the causal convolution")


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    return checked_kernel(source, causal_conv1d_arguments_bytes=ctypes.sizeof(_Arguments))


def _tile_steps(x: Tensor) -> int:
    return _TILE_STEPS if x.shape[0] * x.shape[1] >= _SHORT_STEPS else _SHORT_TILE_STEPS


def _state_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], weight.shape[1] - 1


def _new_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = weight.new_empty(0 if bias is None else bias.shape)
    grad_state = weight.new_empty(0 if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias, grad_state
