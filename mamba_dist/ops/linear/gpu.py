"""Linear map on a GPU: torch's, but for a few rows of bf16 and for gradients to add onto.

I input features, O output features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.gradient_sum import GradientSum
from mamba_dist.ops.linear.gpu_few_rows import few_rows, product_of_few_rows
from mamba_dist.ops.precision import autocast_disabled


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad_x_onto: GradientSum | None = None
) -> Tensor:
    """x @ weight^T + bias, (..., O); arguments are those of `mamba_dist.ops.linear.linear`."""
    # A matrix that is trained is fp32, so that training asks no more than this.
    if weight.dtype == torch.bfloat16 and x.is_cuda:
        rows = few_rows(x, weight, bias)
        if rows is not None:
            return product_of_few_rows(rows, weight, bias).view(*x.shape[:-1], len(weight))
    if grad_x_onto is None or bias is not None:
        return F.linear(x, weight, bias)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
    with autocast_disabled(x):
        y: Tensor = _Linear.apply(x, weight, grad_x_onto)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grad_x_onto: GradientSum) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grad_x_onto = grad_x_onto
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sent = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_weight = None
        # A backward sees the autocast state of whoever calls it.
        with autocast_disabled(x):
            if ctx.needs_input_grad[0]:
                total = ctx.grad_x_onto.taken()
                if total is None:
                    grad_x = (sent @ weight).view(x.shape)
                else:
                    total.view(-1, x.shape[-1]).addmm_(sent, weight)
                    grad_x = total
            if ctx.needs_input_grad[1]:
                # The product, and its layout, that torch's own linear has.
                grad_weight = (x.reshape(-1, x.shape[-1]).T @ sent).T
        return grad_x, grad_weight, None
