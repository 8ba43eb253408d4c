"""Linear map on a GPU: torch's, but for a few rows of bf16 a kernel of our own.

I input features, O output features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.linear.gpu_few_rows import few_rows, product_of_few_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, (..., O); arguments are those of `mamba_dist.ops.linear.linear`."""
    # A matrix that is trained is fp32, so that training asks no more than this.
    if weight.dtype == torch.bfloat16 and _is_on_gpu(x):
        rows = few_rows(x, weight, bias)
        if rows is not None:
            return product_of_few_rows(rows, weight, bias).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda
