"""SSD scan by the native kernels of `cpu.cpp`: the chunked form, with everything adjacent fused.

The forward keeps the inputs and the state at each 256 steps; the backward redoes the rest.

B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.native.call import STORAGE, may_skip_dispatch, pointer, refuse_tangents
from mamba_dist.ops.native.library import checked_kernel
from mamba_dist.ops.precision import compute_dtype

# As in chunks.h.
_LONGEST_CHUNK: Final = 64
_SEGMENT_CHUNKS: Final = 4

_NUMBERS: Final = (
    *("batch", "length", "heads", "headdim", "groups", "d_state", "chunk", "storage"),
    *("dt_storage", "seq_idx_bytes", "dt_softplus", "threads", "x_batch", "x_row", "dt_batch"),
    *("dt_row", "B_batch", "B_row", "C_batch", "C_row", "z_batch", "z_row"),
)
_POINTERS: Final = (
    *("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "seq_idx", "initial_state", "y"),
    *("final_state", "states", "scratch", "grad_y", "grad_final", "grad_x", "grad_dt", "grad_A"),
    *("grad_B", "grad_C", "grad_D", "grad_z", "grad_dt_bias", "grad_initial"),
)
_Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Call(ctypes.Structure):
    """`Call` of chunks.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _NUMBERS) + tuple(
        (name, ctypes.c_void_p) for name in _POINTERS
    )


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    kept: KeptScan | None = None,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, H, P) in x's dtype and final state (B, H, P, N) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.ssd.ssd`. Chunks are at most 64 steps.

    Raises:
        BackendError: the kernels cannot be compiled or loaded.
    """
    refuse_tangents("ssd", x, dt, A, B, C, D, z, dt_bias, initial_state)
    exact = compute_dtype(x)
    streams = [tensor for tensor in (x, B, C, z) if tensor is not None]
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in streams)
    dtype = torch.bfloat16 if narrow else exact
    dt_dtype = dt.dtype if dt.dtype == torch.bfloat16 and exact == torch.float32 else exact
    wanted = (
        *((x, dtype), (dt, dt_dtype), (A, exact), (B, dtype), (C, dtype), (D, exact), (z, dtype)),
        *((dt_bias, exact), (seq_idx, None), (initial_state, exact)),
    )
    # Asked first: for a tensor that has its dtype, `to` is a fifth of a small decoding step.
    inputs = [
        tensor if tensor is None or to is None or tensor.dtype == to else tensor.to(to)
        for tensor, to in wanted
    ]
    differentiates = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs
    )
    arguments = (*inputs, dt_softplus, chunk_size, differentiates)
    plain = may_skip_dispatch(x)
    if kept is not None and differentiates and plain:
        y, final_state = _KeptSsd.apply(kept, *arguments)  # type: ignore[no-untyped-call]
    else:
        operator: Any = _run_forward if plain and not differentiates else _forward
        y, final_state, _ = operator(*arguments)
    return y if y.dtype == x.dtype else y.to(x.dtype), final_state


def _run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what the backward wants of the states in between."""
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state, dt_softplus, chunk_size)
    results = _new_results(x, A, B, chunk_size, keep_states)
    y, final_state, states = results
    inputs.call.y, inputs.call.final_state = y.data_ptr(), final_state.data_ptr()
    if keep_states:
        inputs.call.states = states.data_ptr()
    if x.shape[1] == 1 and not keep_states:
        _library().ssd_step(ctypes.byref(inputs.call))
    else:
        inputs.run(_library().ssd_forward, backward=False)
    return results


_forward = torch.library.custom_op(
    "mamba_dist::ssd_cpu", _run_forward, mutates_args=(), device_types="cpu"
)


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_results(x, A, B, chunk_size, keep_states)


@torch.library.custom_op("mamba_dist::ssd_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    dt_softplus: bool,
    chunk_size: int,
) -> _Nine:
    """Gradients of the floating inputs in their order; empty for one that was not given."""
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state, dt_softplus, chunk_size)
    grads = _new_gradients(x, dt, A, B, C, D, z, dt_bias, initial_state)
    grad_y = grad_y.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    call = inputs.call
    call.states, call.grad_y = states.data_ptr(), grad_y.data_ptr()
    call.grad_final = pointer(grad_final)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial")
    for name, grad, tensor in zip(
        names, grads, (x, dt, A, B, C, D, z, dt_bias, initial_state), strict=True
    ):
        setattr(call, f"grad_{name}", None if tensor is None else grad.data_ptr())
    inputs.run(_library().ssd_backward, backward=True)
    return grads


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    dt_softplus: bool,
    chunk_size: int,
) -> _Nine:
    return _new_gradients(x, dt, A, B, C, D, z, dt_bias, initial_state)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_softplus, chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = dt_softplus, chunk_size
    # The states' gradient would be a tensor of zeros, made for nothing.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    # Under activation checkpointing saved tensors can be unpacked only once.
    saved = ctx.saved_tensors
    x, initial_state = saved[0], saved[9]
    if grad_y is None:
        grad_y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grads = _backward(grad_y, grad_final, *saved, *ctx.options)
    given = [
        None if tensor is None else grad
        for tensor, grad in zip((*saved[:8], initial_state), grads, strict=True)
    ]
    return *given[:8], None, given[8], None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep_inputs)


class _KeptSsd(torch.autograd.Function):
    """`_forward` with the scan run once, which no operator can say: its arguments are values."""

    @staticmethod
    def forward(ctx: Any, kept: KeptScan, *arguments: Any) -> tuple[Tensor, Tensor]:
        outputs = kept.results(functools.partial(_run_forward, *arguments))
        _keep_inputs(ctx, arguments, outputs)
        return outputs[:2]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        return None, *_differentiate(ctx, grad_y, grad_final, None)


class _Inputs:
    """The inputs of both passes as the kernels want them, alive as long as their pointers are."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        seq_idx: Tensor | None,
        initial_state: Tensor | None,
        dt_softplus: bool,
        chunk_size: int,
    ) -> None:
        batch, length, heads, headdim = x.shape
        x, B, C = _whole_rows(x), _whole_rows(B), _whole_rows(C)
        z = None if z is None else _whole_rows(z)
        dt = dt if dt.stride(2) == 1 or heads == 1 else dt.contiguous()
        D, dt_bias, seq_idx, initial_state = (
            None if tensor is None else tensor.contiguous()
            for tensor in (D, dt_bias, seq_idx, initial_state)
        )
        self._kept = (x, dt, A.contiguous(), B, C, D, z, dt_bias, seq_idx, initial_state)
        self.call = _Call(
            *(batch, length, heads, headdim, B.shape[2], B.shape[3], chunk_size),
            *(STORAGE[x.dtype], STORAGE[dt.dtype]),
            0 if seq_idx is None else seq_idx.element_size(),
            *(dt_softplus, torch.get_num_threads(), *x.stride()[:2], *dt.stride()[:2]),
            *(*B.stride()[:2], *C.stride()[:2], *((0, 0) if z is None else z.stride()[:2])),
            *map(pointer, self._kept),
        )

    def run(self, kernel: Any, *, backward: bool) -> None:
        size = _library().ssd_scratch_bytes(ctypes.byref(self.call), backward)
        scratch = torch.empty(size, dtype=torch.uint8)
        self.call.scratch = scratch.data_ptr()
        kernel(ctypes.byref(self.call))


@functools.cache
def _library() -> ctypes.CDLL:
    library = checked_kernel(
        Path(__file__).with_suffix(".cpp"),
        ssd_call_bytes=ctypes.sizeof(_Call),
        ssd_longest_chunk=_LONGEST_CHUNK,
        ssd_segment_chunks=_SEGMENT_CHUNKS,
    )
    library.ssd_scratch_bytes.restype = ctypes.c_int64
    return library


def _whole_rows(tensor: Tensor) -> Tensor:
    """The tensor (B, L, I, J), copied unless each (I, J) lies in one piece."""
    inner, outer = tensor.stride(3), tensor.stride(2)
    lies = (inner == 1 or tensor.shape[3] == 1) and (
        outer == tensor.shape[3] or tensor.shape[2] == 1
    )
    return tensor if lies else tensor.contiguous()


def _new_results(
    x: Tensor, A: Tensor, B: Tensor, chunk_size: int, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, headdim = x.shape
    segment = min(chunk_size, _LONGEST_CHUNK) * _SEGMENT_CHUNKS
    kept = (length - 1) // segment if keep_states else 0
    return (
        x.new_empty(x.shape),
        A.new_empty(batch, heads, headdim, B.shape[3]),
        A.new_empty(batch, kept, heads, B.shape[3], headdim),
    )


def _new_gradients(*inputs: Tensor | None) -> _Nine:
    like = inputs[0]
    assert like is not None
    x, dt, A, B, C, D, z, dt_bias, initial_state = (
        like.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs
    )
    return x, dt, A, B, C, D, z, dt_bias, initial_state
