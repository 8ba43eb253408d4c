"""Gated RMSNorm on our own CUDA kernels: one that reads each row once, either way.

The gate is computed again in the backward: it costs less than to keep what it gave.

D channels, G groups; the leading dimensions are one here.
"""

import ctypes
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.joint_gradient import GradientPart, empty_gradient
from mamba_dist.ops.native.call import pointer, refuse_tangents
from mamba_dist.ops.nvrtc.compiler import USE_TORCH
from mamba_dist.ops.nvrtc.kernel import call_fields, launch
from mamba_dist.ops.nvrtc.rows import (
    BACKWARD_THREADS,
    FORWARD_THREADS,
    STORAGE,
    RowLayout,
    aligned,
    row_layout,
    rows_of,
)

_FORWARD: Final = Path(__file__).with_name("gpu_forward.cu")
_BACKWARD: Final = Path(__file__).with_name("gpu_backward.cu")


class _ForwardCall(ctypes.Structure):
    """`Call` of gpu_forward.cu."""

    _fields_ = call_fields(
        ("x", "z", "weight", "normed", "reciprocal_rms"),
        ("x_row", "z_row", "rows", "width", "groups", "parts"),
        ("eps",),
    )


class _BackwardCall(ctypes.Structure):
    """`Call` of gpu_backward.cu."""

    _fields_ = call_fields(
        (
            *("grad_normed", "x", "z", "reciprocal_rms", "weight"),
            *("grad_x", "grad_z", "grad_weight"),
        ),
        (
            *("grad_normed_row", "x_row", "z_row", "grad_z_row"),
            *("rows", "width", "groups", "parts"),
        ),
    )


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
    output_dtype: torch.dtype,
    grad_z_into: GradientPart | None = None,
) -> Tensor:
    """Normed (..., D) in `output_dtype`.

    Arguments and shapes are those of `mamba_dist.ops.gated_rms_norm.gated_rms_norm`. bf16 and fp32
    are read and written as they are, anything else, and x and z that differ, through fp32.

    Raises:
        BackendError: x or z is fp64, or the kernels cannot be compiled or run here.
    """
    if weight.dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no fp64 gated_rms_norm; {USE_TORCH}")
    refuse_tangents("gated_rms_norm", x, z, weight)
    if x.dtype != z.dtype or x.dtype not in STORAGE:
        x, z = x.float(), z.float()
    stored = output_dtype if output_dtype in STORAGE else torch.float32
    normed: Tensor = _GatedRMSNorm.apply(  # type: ignore[no-untyped-call]
        x, z, weight, groups, eps, stored, grad_z_into
    )
    return normed.to(output_dtype)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        groups: int,
        eps: float,
        normed_dtype: torch.dtype,
        grad_z_into: GradientPart | None,
    ) -> Tensor:
        layout = row_layout(len(weight) // groups)
        normed, reciprocal_rms = _run_forward(layout, x, z, weight, eps, normed_dtype)
        ctx.layout, ctx.grad_z_into = layout, grad_z_into
        ctx.save_for_backward(x, z, weight, reciprocal_rms)
        return normed

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, reciprocal_rms = ctx.saved_tensors
        # Rows of fours are written four elements at a time.
        grad_z = empty_gradient(z, ctx.grad_z_into, aligned_to=4)
        grad_x, grad_weight = _run_backward(
            ctx.layout, grad_normed, x, z, weight, reciprocal_rms, grad_z
        )
        return grad_x, grad_z, grad_weight, None, None, None, None


def _parts(layout: RowLayout, rows: int, groups: int, resident_threads: int) -> int:
    """Blocks that share the rows of one group."""
    return layout.blocks(rows, max(1, resident_threads // groups))


def _run_forward(
    layout: RowLayout,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Normed, and 1 / rms of each row and group (rows, G)."""
    groups = len(weight) // layout.width
    rows, gates, weight = rows_of(x, layout.width), rows_of(z, layout.width), aligned(weight)
    normed = x.new_empty(x.shape, dtype=normed_dtype)
    reciprocal_rms = weight.new_empty(len(rows), groups)
    parts = _parts(layout, len(rows), groups, FORWARD_THREADS)
    call = _ForwardCall(
        *map(pointer, (rows, gates, weight, normed, reciprocal_rms)),
        *(rows.stride(0), gates.stride(0), len(rows), layout.width, groups, parts, eps),
    )
    kernel = layout.kernel(
        _FORWARD,
        "gated_rms_norm_forward",
        FORWARD_THREADS,
        X_BF16=x.dtype == torch.bfloat16,
        NORMED_BF16=normed_dtype == torch.bfloat16,
    )
    blocks = parts * groups
    launch(kernel, call, blocks=blocks, shared_bytes=layout.shared_bytes, device=x.device)
    return normed, reciprocal_rms


def _run_backward(
    layout: RowLayout,
    grad_normed: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    reciprocal_rms: Tensor,
    grad_z: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fills z's gradient `grad_z`, whose rows are evenly spaced; gives those of x and weight."""
    groups = len(weight) // layout.width
    rows, gates, weight = rows_of(x, layout.width), rows_of(z, layout.width), aligned(weight)
    sent = rows_of(grad_normed, layout.width)
    grad_x = x.new_empty(x.shape)
    grad_z_row = grad_z.view(-1, grad_z.shape[-1]).stride(0)
    parts = _parts(layout, len(rows), groups, BACKWARD_THREADS)
    grad_weight = weight.new_empty(parts * layout.teams, len(weight))
    call = _BackwardCall(
        *map(pointer, (sent, rows, gates, reciprocal_rms, weight, grad_x, grad_z, grad_weight)),
        *(sent.stride(0), rows.stride(0), gates.stride(0), grad_z_row),
        *(len(rows), layout.width, groups, parts),
    )
    kernel = layout.kernel(
        _BACKWARD,
        "gated_rms_norm_backward",
        BACKWARD_THREADS,
        X_BF16=x.dtype == torch.bfloat16,
        NORMED_BF16=sent.dtype == torch.bfloat16,
    )
    # Four sums for each four that a thread holds.
    shared_bytes = layout.shared_bytes + 4 * 4 * layout.held * layout.threads
    launch(kernel, call, blocks=parts * groups, shared_bytes=shared_bytes, device=x.device)
    return grad_x, grad_weight.sum(0)
