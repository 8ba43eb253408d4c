"""Selective scan on the native kernels of `cpu.cpp`, as operators and, in eager mode, directly.

The kernels take tensors whose dtypes they know; `selective_scan` unifies the rest by casts that
autograd and torch.compile see. B batch, L length, E channels, N d_state, G groups.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.native.call import STORAGE, may_skip_dispatch, refuse_tangents, unit_stride
from mamba_dist.ops.native.library import checked_kernel
from mamba_dist.ops.precision import compute_dtype

# Positions between two saved states; the kernels' CHUNK. fp32 states then take a quarter of one
# (B, L, E) fp32 tensor at N = 16.
_CHUNK_STEPS: Final = 64

_POINTERS: Final = (
    *("u", "delta", "z", "B", "C", "A", "D", "delta_bias", "initial_state", "seq_idx"),
    *("y", "final_state", "chunk_states", "grad_y", "grad_final"),
    *("du", "ddelta", "dz", "dB", "dC", "dA", "dD", "ddelta_bias", "dinitial"),
)
_NUMBERS: Final = (
    *("u_batch", "u_row", "delta_batch", "delta_row", "z_batch", "z_row"),
    *("B_batch", "B_row", "B_group", "C_batch", "C_row", "C_group"),
    *("grad_y_batch", "grad_y_row", "seq_idx_batch", "seq_idx_row"),
    *("batch", "length", "channels", "d_state", "groups"),
    *("delta_softplus", "seq_idx_bytes", "storage", "threads"),
)


class _Call(ctypes.Structure):
    """One kernel call; the fields are those of `Call` in cpu.cpp, in its order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    ]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    kept: KeptScan | None = None,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`. The exponents
    are taken with A log2(e), rounded to the compute dtype: a state that grows (A > 0) has the error
    that A rounded once more would give it; of one that decays nothing of that is left.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    refuse_tangents("selective_scan", *tensors)
    compute = compute_dtype(u)
    storage = u.dtype
    if storage not in STORAGE or any(
        tensor is not None and tensor.dtype != storage for tensor in (delta, B, C, z)
    ):
        storage = compute
    with_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    arguments = (
        u.to(storage),
        delta.to(storage),
        A.to(compute),
        B.to(storage),
        C.to(storage),
        None if D is None else D.to(compute),
        None if z is None else z.to(storage),
        None if delta_bias is None else delta_bias.to(compute),
        None if initial_state is None else initial_state.to(compute),
        seq_idx,
        delta_softplus,
        with_gradient,
    )
    if not may_skip_dispatch(u):
        y, final_state, _ = _forward(*arguments)
    elif with_gradient:
        y, final_state = _SelectiveScan.apply(kept, *arguments)  # type: ignore[no-untyped-call]
    else:
        y, final_state, _ = _run_forward(*arguments)
    return y.to(u.dtype), final_state


def _run_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states before each chunk (B, chunks, N, E), or none of them."""
    outputs = _forward_outputs(u, A, keep_states)
    _run(
        "step" if u.shape[1] == 1 and not keep_states else "forward",
        (u, delta, z, B, C),
        (A, D, delta_bias, initial_state),
        seq_idx,
        delta_softplus=delta_softplus,
        outputs=outputs,
    )
    return outputs


def _forward_outputs(u: Tensor, A: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), d_state = u.shape, A.shape[1]
    y = u.new_empty(batch, length, channels)
    final_state = A.new_empty(batch, channels, d_state)
    chunks = (length + _CHUNK_STEPS - 1) // _CHUNK_STEPS if keep_states else 0
    return y, final_state, A.new_empty(batch, chunks, d_state, channels)


_forward = torch.library.custom_op(
    "mamba_dist::selective_scan_forward", _run_forward, mutates_args=(), device_types="cpu"
)


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(u, A, keep_states)


def _run_backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    chunk_states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    initial_gradient: bool,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state; absent ones empty."""
    gradients = _gradients(u, A, B, D, z, delta_bias, initial_gradient)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial = gradients
    _run(
        "backward",
        (u, delta, z, B, C),
        (A, D, delta_bias, None),
        seq_idx,
        delta_softplus=delta_softplus,
        outputs=(None, None, chunk_states),
        output_gradients=(grad_y, grad_final),
        gradients=(du, ddelta, dz, dB, dC, dA, dD, ddelta_bias, dinitial),
    )
    return gradients


def _gradients(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_gradient: bool,
) -> list[Tensor]:
    (batch, _, channels), d_state = u.shape, A.shape[1]

    def per_channel(tensor: Tensor | None) -> Tensor:
        return A.new_empty(0 if tensor is None else channels)

    return [
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        B.new_empty(B.shape),
        per_channel(D),
        u.new_empty(0 if z is None else u.shape),
        per_channel(delta_bias),
        A.new_empty((batch, channels, d_state) if initial_gradient else 0),
    ]


_backward = torch.library.custom_op(
    "mamba_dist::selective_scan_backward", _run_backward, mutates_args=(), device_types="cpu"
)


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final: Tensor | None,
    chunk_states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    initial_gradient: bool,
) -> list[Tensor]:
    return _gradients(u, A, B, D, z, delta_bias, initial_gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, seq_idx, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, seq_idx, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    backward: Any, ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, seq_idx, chunk_states = ctx.saved_tensors
    with_initial = initial_state is not None
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = backward(
        grad_y, grad_final, chunk_states, *tensors, seq_idx, ctx.delta_softplus, with_initial
    )
    absent = (*(tensor is None for tensor in tensors), not with_initial)
    wanted = (None if skip else g for g, skip in zip(gradients, absent, strict=True))
    return (*wanted, None, None, None)


_forward.register_autograd(
    lambda ctx, grad_y, grad_final, _: _differentiate(_backward, ctx, grad_y, grad_final),
    setup_context=_save,
)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: KeptScan | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        run = functools.partial(_run_forward, *arguments)
        outputs = run() if kept is None else kept.results(run)
        _save(ctx, arguments, outputs)
        return outputs[:2]

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return None, *_differentiate(_run_backward, ctx, grad_y, grad_final)


def _run(
    kernel: str,
    rows: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    seq_idx: Tensor | None,
    *,
    delta_softplus: bool,
    outputs: tuple[Tensor | None, ...],
    output_gradients: tuple[Tensor | None, Tensor | None] = (None, None),
    gradients: tuple[Tensor | None, ...] = (None,) * 9,
) -> None:
    """Calls a kernel; each tuple has the order of the fields of `Call`."""
    u, delta, z, B, C = rows
    u, delta, B, C = unit_stride(u), unit_stride(delta), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)
    A, *optional = parameters
    A, (D, delta_bias, initial_state) = A.contiguous(), map(_contiguous, optional)
    grad_y, grad_final = output_gradients
    grad_y, grad_final = None if grad_y is None else unit_stride(grad_y), _contiguous(grad_final)
    # As locals the tensors outlive the call. An empty one has a null pointer, as an absent one.
    tensors = (
        *(u, delta, z, B, C, A, D, delta_bias, initial_state, seq_idx),
        *(*outputs, grad_y, grad_final, *gradients),
    )
    call = _Call(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(*u.stride()[:2], *_row_strides(delta), *_row_strides(z)),
        *(*B.stride()[:3], *C.stride()[:3]),
        *(*_row_strides(grad_y), *_row_strides(seq_idx)),
        *(*u.shape, A.shape[1], B.shape[2]),
        *(delta_softplus, 0 if seq_idx is None else seq_idx.element_size()),
        *(STORAGE[u.dtype], torch.get_num_threads()),
    )
    if getattr(_library(), f"selective_scan_{kernel}")(ctypes.byref(call)):
        raise MemoryError(f"not enough memory for the scratch of the selective scan's {kernel}")


def _row_strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@functools.cache
def _library() -> ctypes.CDLL:
    return checked_kernel(
        Path(__file__).with_name("cpu.cpp"),
        selective_scan_call_bytes=ctypes.sizeof(_Call),
        selective_scan_chunk_steps=_CHUNK_STEPS,
    )
