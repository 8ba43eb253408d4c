"""SSD scan by our own Triton kernels: the chunked form, with everything adjacent fused.

The forward is one kernel that carries a head's state over the chunks in registers, and it keeps
nothing but the inputs. With bf16 inputs the kernels multiply in bf16, or in fp16 over scales where
a sum cancels, and add up in fp32; with others they keep fp32's precision throughout. All sums have
a fixed order, so that equal inputs give equal bits.

No decay is ever taken over a document's start. An infinite or NaN input still makes later documents
of its row NaN, and in the gradients earlier ones too, because zero times it is NaN; other rows stay
clear of it. The torch backend keeps it in its document.

B batch, L length, H heads, P headdim, N d_state, G groups.
"""

import functools
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.joint_gradient import GradientPart, empty_gradient
from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.native.call import refuse_tangents, unit_stride
from mamba_dist.ops.nvrtc.state_step import MOST_STATES, is_plain_step
from mamba_dist.ops.precision import autocast_disabled
from mamba_dist.ops.ssd import torch_chunked
from mamba_dist.ops.ssd.gpu_step import ssd_step
from mamba_dist.ops.triton_package import USE_TORCH, import_triton_module

# A chunk's tiles of a larger one would not fit in shared memory.
_LARGEST_D_STATE: Final = 256

_Part = GradientPart | None
GradientParts = tuple[_Part, _Part, _Part, _Part]
"""Places for the gradients of x, dt, B and C."""
NO_PARTS: Final[GradientParts] = (None, None, None, None)

_Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.cache
def require_triton() -> Any:
    """The module that launches the kernels, imported at this moment.

    Importing it with this one would break machines without a GPU, whose torch brings no Triton.

    Raises:
        BackendError: importing failed, in whatever way.
    """
    return import_triton_module("mamba_dist.ops.ssd.triton_launch")


def has_kernel(d_state: int, *, length: int) -> bool:
    """Whether a scan of so many states and steps runs in kernels, not in the torch backend."""
    return length > 1 and d_state <= _LARGEST_D_STATE


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
    grads_into: GradientParts = NO_PARTS,
    A_is_log: bool = False,
    donate_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, H, P) in x's dtype and final state (B, H, P, N) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.ssd.ssd`; the chunk is a power of two from 16
    to 64, as long as `chunk_size` allows. One step has a CUDA kernel of its own; with gradients it
    goes to the torch backend, as a d_state above 256 does.

    Raises:
        BackendError: Triton cannot be imported, the step's kernel cannot be compiled or run here,
            or x is fp64.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    refuse_tangents("ssd", *tensors)
    if x.dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no float64 kernel for ssd; {USE_TORCH}")
    if B.shape[3] <= MOST_STATES and is_plain_step(x.shape[1], *tensors):
        return ssd_step(
            *tensors, softplus=dt_softplus, A_is_log=A_is_log, donate_state=donate_state
        )
    if A_is_log:
        A = -torch.exp(A)
    if not has_kernel(B.shape[3], length=x.shape[1]):
        return torch_chunked.ssd(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, chunk_size
        )
    return _scanned(
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, chunk_size),
        *(kept, grads_into),
    )


def _scanned(
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
    kept: KeptScan | None,
    grads_into: GradientParts,
) -> tuple[Tensor, Tensor]:
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in (x, B, C))
    dtype = torch.bfloat16 if narrow else torch.float32
    with autocast_disabled(x):
        D, dt_bias, initial_state = (
            None if tensor is None else tensor.float() for tensor in (D, dt_bias, initial_state)
        )
        arguments = (
            x.to(dtype),
            dt if dt.dtype == torch.bfloat16 else dt.float(),
            A.float(),
            B.to(dtype),
            C.to(dtype),
            D,
            dt_bias,
            seq_idx,
            initial_state,
            dt_softplus,
            chunk_size,
            # With a gate, y is rounded once, after it.
            torch.float32 if z is not None else x.dtype,
        )
        # A compiler can look into operators only.
        by_value = kept is None and grads_into == NO_PARTS
        if not by_value and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y, final_state = _Ssd.apply(kept, grads_into, *arguments)  # type: ignore[no-untyped-call]
        else:
            y, final_state = _forward(*arguments)
        if z is not None:
            y = y * F.silu(z.float())
        return y.to(x.dtype), final_state


# Not of device type "cuda" only: Triton's interpreter, as the tests use it, takes CPU tensors.
@torch.library.custom_op("mamba_dist::ssd_gpu", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    inputs = x, dt, A, B, C, D, dt_bias, seq_idx, initial_state
    return _run_forward(*inputs, dt_softplus, chunk_size, y_dtype)


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _new_results(x, B, y_dtype)


def _run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, final_state = _new_results(x, B, y_dtype)
    inputs = _readable(x, dt, A, B, C, D, dt_bias, seq_idx, initial_state)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        require_triton().forward(*inputs, dt_softplus, chunk_size, y, final_state)
    return y, final_state


@torch.library.custom_op("mamba_dist::ssd_gpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> _Eight:
    """Gradients of the floating inputs in their order; empty for one that was not given."""
    gradients = _new_gradients(NO_PARTS, x, dt, A, B, C, D, dt_bias, initial_state)
    inputs = x, dt, A, B, C, D, dt_bias, seq_idx, initial_state
    _run_backward(grad_y, grad_final, *inputs, dt_softplus, chunk_size, gradients=gradients)
    return gradients


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
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> _Eight:
    return _new_gradients(NO_PARTS, x, dt, A, B, C, D, dt_bias, initial_state)


def _run_backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    *,
    gradients: _Eight,
) -> None:
    inputs = _readable(x, dt, A, B, C, D, dt_bias, seq_idx, initial_state)
    # With a gate it is fp32, as y is, and the kernels need its digits.
    grad_y = unit_stride(grad_y if grad_y.dtype == torch.float32 else grad_y.to(x.dtype))
    grad_final = None if grad_final is None else grad_final.contiguous()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        require_triton().backward(*inputs, dt_softplus, chunk_size, grad_y, grad_final, gradients)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_softplus, chunk_size, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = dt_softplus, chunk_size
    # The final state's gradient would be a tensor of zeros, made for nothing.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
    # Under activation checkpointing saved tensors can be unpacked only once.
    saved = ctx.saved_tensors
    found = _backward(_present(grad_y, saved[0]), grad_final, *saved, *ctx.options)
    return _of_arguments(saved, found)


def _present(grad_y: Tensor | None, x: Tensor) -> Tensor:
    if grad_y is not None:
        return grad_y
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _of_arguments(saved: tuple[Tensor | None, ...], found: _Eight) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of `_forward`, None for those that were not given."""
    given = [
        None if tensor is None else gradient
        for tensor, gradient in zip((*saved[:7], saved[8]), found, strict=True)
    ]
    return *given[:7], None, given[7], None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep_inputs)


class _Ssd(torch.autograd.Function):
    """`_forward` with what no operator can say, whose arguments are values and results its own.

    The scan is run once for all recomputations, and gradients go to the places for them.
    """

    @staticmethod
    def forward(
        ctx: Any, kept: KeptScan | None, grads_into: GradientParts, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        # Not by the operator, whose dispatch costs more than a small scan.
        run = functools.partial(_run_forward, *arguments)
        wanted = any(ctx.needs_input_grad)
        outputs: tuple[Tensor, Tensor] = kept.results(run) if kept is not None and wanted else run()
        _keep_inputs(ctx, arguments, outputs)
        ctx.grads_into = grads_into
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        floating = *saved[:7], saved[8]
        gradients = _new_gradients(ctx.grads_into, *floating)
        grad_y = _present(grad_y, saved[0])
        _run_backward(grad_y, grad_final, *saved, *ctx.options, gradients=gradients)
        return None, None, *_of_arguments(saved, gradients)


def _readable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The inputs as the kernels can read them, copied only where they cannot."""
    D, dt_bias, seq_idx, initial_state = (
        None if tensor is None else tensor.contiguous()
        for tensor in (D, dt_bias, seq_idx, initial_state)
    )
    streams = unit_stride(x), dt, A.contiguous(), unit_stride(B), unit_stride(C)
    return *streams, D, dt_bias, seq_idx, initial_state


def _new_results(x: Tensor, B: Tensor, y_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, _, heads, headdim = x.shape
    return (
        x.new_empty(x.shape, dtype=y_dtype),
        x.new_empty(batch, heads, headdim, B.shape[3], dtype=torch.float32),
    )


def _new_gradients(
    grads_into: GradientParts,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> _Eight:
    of_D, of_bias, of_initial = (
        x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (D, dt_bias, initial_state)
    )
    of_x, of_dt, of_B, of_C = map(empty_gradient, (x, dt, B, C), grads_into)
    return of_x, of_dt, A.new_empty(A.shape), of_B, of_C, of_D, of_bias, of_initial
