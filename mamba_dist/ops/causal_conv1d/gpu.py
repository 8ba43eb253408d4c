"""Causal convolution on our own CUDA kernels, compiled at the first use; see `gpu_column.cuh`.

Bias and SiLU are fused. The backward computes the convolution again, so that only the inputs are
kept, and adds up gradients of weight and bias in a fixed order.

B batch, L length, E channels, K kernel width.
"""

import ctypes
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.causal_conv1d import torch_chunked
from mamba_dist.ops.causal_conv1d.gpu_step import causal_conv1d_step
from mamba_dist.ops.cuda_packages import document_numbers
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.joint_gradient import GradientPart, empty_gradient
from mamba_dist.ops.native.call import pointer, refuse_tangents, unit_stride
from mamba_dist.ops.nvrtc.compiler import USE_TORCH
from mamba_dist.ops.nvrtc.kernel import Kernel, call_fields, launch, specialised
from mamba_dist.ops.nvrtc.state_step import is_plain_step

_SOURCES: Final = MappingProxyType(
    {name: Path(__file__).with_name(f"gpu_{name}.cu") for name in ("forward", "backward")}
)
_WIDTHS: Final = range(2, 5)
_WARP_LANES: Final = 32
# Steps of the backward that a warp has before it is another warp's turn. Shorter runs repeat more
# at their ends; longer ones lose what neighbours share from the cache.
_RUN_STEPS: Final = 32


class _Shape(NamedTuple):
    """How the work of one direction is cut.

    access_bytes: what a lane reads at once where alignment allows; the backward holds several
        numbers per channel in registers, and so has fewer channels a lane.
    block_steps: of a row, by all warps of a block together.
    """

    access_bytes: int
    warps: int
    blocks_per_sm: int
    block_steps: int


_SHAPES: Final = MappingProxyType(
    {
        "forward": _Shape(access_bytes=16, warps=4, blocks_per_sm=3, block_steps=64),
        "backward": _Shape(access_bytes=8, warps=8, blocks_per_sm=2, block_steps=256),
    }
)


class _ForwardCall(ctypes.Structure):
    """`Call` of gpu_forward.cu."""

    _fields_ = call_fields(
        ("x", "weight", "bias", "initial_state", "seq_idx", "y", "final_state"),
        ("x_batch", "x_row", "seq_idx_batch", "length", "channels", "block_steps"),
    )


class _BackwardCall(ctypes.Structure):
    """`Call` of gpu_backward.cu."""

    _fields_ = call_fields(
        (
            *("x", "grad_y", "weight", "bias", "initial_state", "grad_final_state", "seq_idx"),
            *("grad_x", "grad_initial_state", "shares"),
        ),
        (
            *("x_batch", "x_row", "grad_y_batch", "grad_y_row", "grad_x_batch", "grad_x_row"),
            *("seq_idx_batch", "length", "channels", "block_steps", "run_steps"),
        ),
    )


class _Inputs(NamedTuple):
    """What the kernels take: x in bf16 or fp32, the rest in fp32, document numbers in int32."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None


def has_kernel(width: int) -> bool:
    """Whether a convolution of K `width` runs in a kernel, not in the torch backend."""
    return width in _WIDTHS


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
    grad_x_into: GradientPart | None = None,
    donate_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, L, E) in x's dtype and, if asked for, final state (B, E, K - 1) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.causal_conv1d.causal_conv1d`. bf16 and fp32
    are read as they are, through any strides of rows, anything else through fp32. Widths other than
    2 to 4 go to the torch backend.

    Raises:
        BackendError: x is fp64, or the kernels cannot be compiled or run here.
    """
    if x.dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no fp64 causal_conv1d; {USE_TORCH}")
    if not has_kernel(weight.shape[1]):
        return torch_chunked.causal_conv1d(
            x, weight, bias, seq_idx, initial_state, return_final_state, silu
        )
    refuse_tangents("causal_conv1d", x, weight, bias, initial_state)
    if is_plain_step(x.shape[1], x, weight, bias, initial_state):
        y, final_state = causal_conv1d_step(
            x[:, 0],
            weight,
            bias,
            initial_state,
            return_final_state=return_final_state,
            silu=silu,
            donate_state=donate_state,
        )
        return y[:, None], final_state
    if seq_idx is not None and seq_idx.dtype != torch.int32:
        seq_idx = document_numbers(seq_idx)
    y, final_state = _CausalConv1d.apply(  # type: ignore[no-untyped-call]
        return_final_state,
        silu,
        grad_x_into,
        x if x.dtype == torch.bfloat16 else x.float(),
        weight.float(),
        None if bias is None else bias.float(),
        None if initial_state is None else initial_state.float(),
        seq_idx if x.shape[1] > 1 else None,
    )
    return y.to(x.dtype), final_state


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        return_final_state: bool,
        silu: bool,
        grad_x_into: GradientPart | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = _Inputs(*tensors)  # type: ignore[arg-type]
        ctx.silu, ctx.grad_x_into = silu, grad_x_into
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return _run_forward(_prepared(inputs), return_final_state, silu)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        inputs = _prepared(_Inputs(*ctx.saved_tensors))
        grad_y = torch.zeros_like(inputs.x) if grad_y is None else unit_stride(grad_y)
        grad_final = None if grad_final is None else grad_final.contiguous()
        grad_x = empty_gradient(inputs.x, ctx.grad_x_into)
        others = _run_backward(inputs, ctx.silu, grad_y, grad_final, grad_x)
        return None, None, None, grad_x, *others, None


def _prepared(inputs: _Inputs) -> _Inputs:
    """Rows whose elements lie side by side; the rest contiguous."""
    return _Inputs(
        x=unit_stride(inputs.x),
        weight=_aligned_weight(inputs.weight),
        bias=None if inputs.bias is None else inputs.bias.contiguous(),
        initial_state=None if inputs.initial_state is None else inputs.initial_state.contiguous(),
        seq_idx=None if inputs.seq_idx is None else unit_stride(inputs.seq_idx),
    )


def _aligned_weight(weight: Tensor) -> Tensor:
    """The weight where a row of 4 can be read at once."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def _vector(rows: tuple[Tensor, ...], access_bytes: int) -> int:
    """Channels that a lane reads at once from all of the (B, L, E) rows."""
    count = access_bytes // rows[0].element_size()
    while count > 1 and not all(_allows(tensor, count) for tensor in rows):
        count //= 2
    return count


def _allows(rows: Tensor, count: int) -> bool:
    """Whether every `count` neighbouring channels are aligned for one access."""
    # The stride of an axis of one entry may be anything, and is never used.
    strides = [rows.stride(axis) for axis in (0, 1) if rows.shape[axis] > 1]
    in_steps = all(number % count == 0 for number in (rows.shape[2], *strides))
    return in_steps and rows.data_ptr() % (count * rows.element_size()) == 0


def _kernel(direction: str, inputs: _Inputs, silu: bool, vector: int, **macros: bool) -> Kernel:
    shape = _SHAPES[direction]
    # One step is one warp's work, and the others of its block would have none.
    warps = 1 if inputs.x.shape[1] == 1 else shape.warps
    return specialised(
        _SOURCES[direction],
        f"causal_conv1d_{direction}",
        threads=_WARP_LANES * warps,
        blocks_per_sm=shape.blocks_per_sm,
        STORAGE_BF16=inputs.x.dtype == torch.bfloat16,
        VECTOR=vector,
        WIDTH=inputs.weight.shape[1],
        SILU=silu,
        DOCUMENTS=inputs.seq_idx is not None,
        **macros,
    )


def _parts(inputs: _Inputs, direction: str) -> int:
    """Blocks along a row."""
    return -(-inputs.x.shape[1] // _SHAPES[direction].block_steps)


def _blocks(inputs: _Inputs, direction: str, vector: int) -> int:
    batch, _, channels = inputs.x.shape
    return batch * _parts(inputs, direction) * -(-channels // (_WARP_LANES * vector))


def _id_stride(inputs: _Inputs) -> int:
    return 0 if inputs.seq_idx is None else inputs.seq_idx.stride(0)


def _run_forward(
    inputs: _Inputs, return_final_state: bool, silu: bool
) -> tuple[Tensor, Tensor | None]:
    x, weight = inputs.x, inputs.weight
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    final_state = None
    if return_final_state:
        final_state = weight.new_empty(batch, channels, weight.shape[1] - 1)
    # One step is a matter of latency, not of bandwidth: as many lanes as possible.
    vector = 1 if length == 1 else _vector((x, y), _SHAPES["forward"].access_bytes)
    call = _ForwardCall(
        *map(pointer, (x, weight, inputs.bias, inputs.initial_state, inputs.seq_idx)),
        *map(pointer, (y, final_state)),
        *(x.stride(0), x.stride(1), _id_stride(inputs)),
        *(length, channels, _SHAPES["forward"].block_steps),
    )
    launch(
        _kernel("forward", inputs, silu, vector),
        call,
        blocks=_blocks(inputs, "forward", vector),
        shared_bytes=0,
        device=x.device,
    )
    return y, final_state


def _run_backward(
    inputs: _Inputs, silu: bool, grad_y: Tensor, grad_final: Tensor | None, grad_x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fills x's gradient `grad_x` (B, L, E); gives those of weight, bias and initial state."""
    x, weight, initial_state = inputs.x, inputs.weight, inputs.initial_state
    batch, length, channels = x.shape
    width = weight.shape[1]
    grad_initial = None if initial_state is None else torch.empty_like(initial_state)
    shares = weight.new_empty(batch * _parts(inputs, "backward"), width + 1, channels)
    shape = _SHAPES["backward"]
    vector = _vector((x, grad_y, grad_x), shape.access_bytes)
    has_states = grad_initial is not None or grad_final is not None
    kernel = _kernel("backward", inputs, silu, vector, STATES=has_states)
    call = _BackwardCall(
        *map(pointer, (x, grad_y, weight, inputs.bias, initial_state, grad_final)),
        *map(pointer, (inputs.seq_idx, grad_x, grad_initial, shares)),
        *(x.stride(0), x.stride(1), grad_y.stride(0), grad_y.stride(1)),
        *(grad_x.stride(0), grad_x.stride(1), _id_stride(inputs)),
        *(length, channels, shape.block_steps, _RUN_STEPS),
    )
    launch(
        kernel,
        call,
        blocks=_blocks(inputs, "backward", vector),
        # Of each warp, the sums of its channels.
        shared_bytes=4 * (kernel.threads * vector * (width + 1)),
        device=x.device,
    )
    sums = shares.sum(0)  # (K + 1, E)
    grad_weight = sums[:width].T.contiguous()
    return grad_weight, None if inputs.bias is None else sums[width], grad_initial
