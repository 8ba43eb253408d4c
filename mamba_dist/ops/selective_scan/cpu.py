"""Selective scan on the native kernels of `cpu.cpp`: two operators and the way to call them.

The operators take tensors whose dtypes the kernels know; `selective_scan` unifies the rest by casts
that autograd and torch.compile see. B batch, L length, E channels, N d_state, G groups.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.ops.native.library import load_kernel
from mamba_dist.ops.precision import compute_dtype

# Positions between two saved states; the kernels' CHUNK. fp32 states then take a quarter of one
# (B, L, E) fp32 tensor at N = 16.
_CHUNK_STEPS: Final = 64
_STORAGE: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

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

    _fields_ = [  # noqa: RUF012
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
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    compute = compute_dtype(u)
    storage = u.dtype
    if storage not in _STORAGE or any(
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
    y, final_state, _ = _forward(*arguments)
    return y.to(u.dtype), final_state


@torch.library.custom_op("mamba_dist::selective_scan_forward", mutates_args=(), device_types="cpu")
def _forward(
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
    y, final_state, chunk_states = _forward_outputs(u, A, keep_states)
    call = _Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus)
    kernel = "step" if u.shape[1] == 1 and not keep_states else "forward"
    call.run(
        kernel,
        y=y,
        final_state=final_state,
        chunk_states=chunk_states if keep_states else None,
    )
    return y, final_state, chunk_states


def _forward_outputs(u: Tensor, A: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), d_state = u.shape, A.shape[1]
    y = u.new_empty(batch, length, channels)
    final_state = A.new_empty(batch, channels, d_state)
    chunks = (length + _CHUNK_STEPS - 1) // _CHUNK_STEPS if keep_states else 0
    return y, final_state, A.new_empty(batch, chunks, d_state, channels)


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


@torch.library.custom_op("mamba_dist::selective_scan_backward", mutates_args=(), device_types="cpu")
def _backward(
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
    call = _Inputs(u, delta, A, B, C, D, z, delta_bias, None, seq_idx, delta_softplus)
    names = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial")
    call.run(
        "backward",
        grad_y=_unit_stride(grad_y),
        grad_final=None if grad_final is None else grad_final.contiguous(),
        chunk_states=chunk_states,
        **{n: g for n, g in zip(names, gradients, strict=True) if g.numel()},
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
    *tensors, initial_state, seq_idx, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, seq_idx, output[2])
    ctx.with_initial = initial_state is not None
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, seq_idx, chunk_states = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = _backward(
        grad_y,
        grad_final,
        chunk_states,
        *tensors,
        seq_idx,
        ctx.delta_softplus,
        ctx.with_initial,
    )
    absent = (*(tensor is None for tensor in tensors), not ctx.with_initial)
    return (
        *(None if skip else g for g, skip in zip(gradients, absent, strict=True)),
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


class _Inputs:
    """The tensors that forward and backward share, kept alive while a kernel reads them."""

    def __init__(
        self,
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
    ) -> None:
        self._rows = {
            name: _unit_stride(tensor)
            for name, tensor in (("u", u), ("delta", delta), ("z", z), ("B", B), ("C", C))
            if tensor is not None
        }
        if seq_idx is not None:
            self._rows["seq_idx"] = seq_idx
        self._whole = {
            name: tensor.contiguous()
            for name, tensor in (
                ("A", A),
                ("D", D),
                ("delta_bias", delta_bias),
                ("initial_state", initial_state),
            )
            if tensor is not None
        }
        batch, length, channels = u.shape
        self._numbers = {
            "batch": batch,
            "length": length,
            "channels": channels,
            "d_state": A.shape[1],
            "groups": B.shape[2],
            "delta_softplus": delta_softplus,
            "seq_idx_bytes": 0 if seq_idx is None else seq_idx.element_size(),
            "storage": _STORAGE[u.dtype],
            "threads": torch.get_num_threads(),
        }

    def run(self, kernel: str, *, grad_y: Tensor | None = None, **others: Tensor | None) -> None:
        rows = self._rows if grad_y is None else self._rows | {"grad_y": grad_y}
        call = _Call(**self._numbers)
        for name, tensor in rows.items():
            setattr(call, name, tensor.data_ptr())
            setattr(call, f"{name}_batch", tensor.stride(0))
            setattr(call, f"{name}_row", tensor.stride(1))
            if name in ("B", "C"):
                setattr(call, f"{name}_group", tensor.stride(2))
        for name, whole in (self._whole | others).items():
            if whole is not None:
                setattr(call, name, whole.data_ptr())
        if getattr(_library(), f"selective_scan_{kernel}")(ctypes.byref(call)):
            raise MemoryError(f"not enough memory for the scratch of the selective scan's {kernel}")


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_kernel(Path(__file__).with_name("cpu.cpp"))
    size = library.selective_scan_call_bytes
    size.restype = ctypes.c_int64
    steps = library.selective_scan_chunk_steps
    steps.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(_Call)
    assert steps() == _CHUNK_STEPS
    return library
