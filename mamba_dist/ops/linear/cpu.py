"""Linear map on the CPU, with products in the library and the precision that are fastest there.

With AVX-512 fp32 products go to oneDNN, elsewhere to MKL as torch has it. MKL leaves AVX-512
unused on some AMD CPUs (oneDNN was twice as fast on Zen 5, 1 to 9 % faster on Zen 4) and was the
faster one with AVX2, for the gradients above all (Zen 3, both called by hand). torch's public way
to oneDNN, `Tensor.to_mkldnn`, loses all of that to its copies. The operator used here is the one
that torch's own compiler puts into its CPU programs; it is touched in this file only, and
tests/ops/test_linear.py would notice a change of its meaning.

bf16 products go to oneDNN where it has instructions for them. Elsewhere torch's own loop takes 30
to 50 times as long forward and backward (Zen 3, `tools/bench.py ops --op linear`), so bf16 tensors
are widened to fp32 some rows at a time, and weights are not rounded at all: it takes bf16's memory
and fp32's time.

R rows, I input features, O output features.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.precision import autocast_disabled

# Looked up once: a compiler cannot trace the questions.
_HAS_ONEDNN: Final[bool] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_PREFERS_ONEDNN: Final = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"
_HAS_BF16: Final[bool] = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()

# Widened at once: fewer rows make the library slower, more of them only take memory.
_WIDENED_ROWS: Final = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) @ weight^T + bias, (..., O); arguments as in the package."""
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    autocast = torch.is_autocast_enabled("cpu")
    function: Any
    if _is_emulated_bf16(dtypes, torch.get_autocast_dtype("cpu") if autocast else None):
        x, function = x.to(torch.bfloat16), _WidenedLinear
    elif dtypes == {torch.float32} and not autocast and _suits_onednn(x, weight):
        function = _OneDnnLinear
    else:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    ):
        y: Tensor = function.apply(_rows(x), weight, bias)
    else:
        y = function.product(_rows(x), weight, bias)
    # Outside of the Function, whose results must not be views: they could not be changed in place.
    return y.view(*x.shape[:-1], len(weight))


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster one here, and its operator takes these."""
    return (
        _PREFERS_ONEDNN
        and x.numel() > 0
        and weight.numel() > 0
        # Its list of scalars is no argument that a trace can hold.
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` are best computed in: itself, but fp32 for an emulated bf16."""
    return torch.float32 if _is_emulated_bf16({dtype}, None) else dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, I) @ weight^T, (R, O), without a graph, in the fastest library for the dtype."""
    if x.dtype == weight.dtype == torch.float32 and _suits_onednn(x, weight):
        return _onednn_product(x, weight, None)
    return x @ weight.t()


def _is_emulated_bf16(dtypes: set[torch.dtype], autocast_dtype: torch.dtype | None) -> bool:
    if _HAS_BF16:
        return False
    if autocast_dtype is None:
        return dtypes == {torch.bfloat16}
    return autocast_dtype == torch.bfloat16 and dtypes <= {torch.float32, torch.bfloat16}


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Rows with a stride made oneDNN 18 times slower; a transposed weight costs it nothing.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return y


def _onednn_transposed(x: Tensor, weight: Tensor) -> Tensor:
    return _onednn_product(x, weight.t(), None)


class _OneDnnLinear(torch.autograd.Function):
    """x (R, I), all of it fp32."""

    product = staticmethod(_onednn_product)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # oneDNN's operator has no derivative.
        product = torch.mm if torch.is_grad_enabled() else _onednn_transposed
        grad_x = product(grad, weight) if wanted[0] else None
        # MKL: oneDNN is slower where one factor is thin (I or O below about 64).
        grad_weight = grad.t() @ x if wanted[1] else None
        return grad_x, grad_weight, grad.sum(0) if wanted[2] else None


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, I) bf16 @ weight^T in fp32, then (R, O) bf16."""
    y = x.new_empty(len(x), len(weight))
    wide_weight, wide_bias = weight.float(), None if bias is None else bias.float()
    with autocast_disabled(x):
        for part in _parts(len(x)):
            y[part] = F.linear(x[part].float(), wide_weight, wide_bias)
    return y


class _WidenedLinear(torch.autograd.Function):
    """x (R, I) and y bf16; weight and bias of either dtype, their gradients summed in fp32."""

    product = staticmethod(_widened_product)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _widened_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        wide_weight = weight.float()
        if torch.is_grad_enabled():
            # To be differentiated again, so in whole tensors that autograd follows.
            wide_rows = grad.float()
            return (
                (wide_rows @ wide_weight).to(x.dtype) if wanted[0] else None,
                (wide_rows.t() @ x.float()).to(weight.dtype) if wanted[1] else None,
                wide_rows.sum(0).to(ctx.bias_dtype) if wanted[2] else None,
            )
        grad_x = torch.empty_like(x) if wanted[0] else None
        grad_weight = torch.zeros_like(wide_weight) if wanted[1] else None
        grad_bias = wide_weight.new_zeros(len(weight)) if wanted[2] else None
        with autocast_disabled(grad):
            for part in _parts(len(grad)):
                wide_rows = grad[part].float()
                if grad_x is not None:
                    grad_x[part] = wide_rows @ wide_weight
                if grad_weight is not None:
                    grad_weight.addmm_(wide_rows.t(), x[part].float())
                if grad_bias is not None:
                    grad_bias += wide_rows.sum(0)
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(ctx.bias_dtype),
        )


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _WIDENED_ROWS) for start in range(0, rows, _WIDENED_ROWS))
