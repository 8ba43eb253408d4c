"""Linear map on the CPU with fp32 products in oneDNN.

torch sends fp32 products to MKL and bf16 ones to oneDNN. MKL is as fast as oneDNN on most CPUs, but
on some AMD ones it leaves AVX-512 unused: oneDNN was twice as fast on Zen 5, 1 to 9 % faster on
Zen 4 (`tools/bench.py ops`). torch's public way to oneDNN, `Tensor.to_mkldnn`, loses all of that to
its copies. The operator used here is the one that torch's own compiler puts into its CPU programs;
it is touched in this file only, and tests/ops/test_linear.py would notice a change of its meaning.

R rows, I input features, O output features.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Looked up once: a compiler cannot trace the question.
_HAS_ONEDNN: Final[bool] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) @ weight^T + bias, (..., O); arguments as in the package."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_autocast_enabled("cpu") or not all(map(_is_ours, tensors)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, I) @ weight^T, (R, O), without a graph, in the fastest library for the dtype."""
    return _product(x, weight, None) if _is_ours(x) and _is_ours(weight) else x @ weight.t()


def _is_ours(tensor: Tensor) -> bool:
    return _HAS_ONEDNN and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Rows with a stride made oneDNN 18 times slower; a transposed weight costs it nothing.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(rows, weight.t(), None).view(x.shape) if wanted[0] else None
        # MKL: oneDNN is slower where one factor is thin (I or O below about 64).
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
        return grad_x, grad_weight, rows.sum(0) if wanted[2] else None
