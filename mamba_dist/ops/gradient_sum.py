"""The gradient of a tensor with two uses, added up by the matrix product of one of them.

Autograd adds two gradients in a kernel of its own, which reads both and writes their sum. A matrix
product can add onto what lies at its output for the price of reading that. So the first use keeps
its gradient back, and the product's backward takes it, adds its own and passes on the sum.

What is kept back was never handed to autograd, so nobody else holds what the product writes to.
"""

import functools
import operator
from typing import Any, Final

import torch
from torch import Tensor

# Whose ops keep gradients back.
_ADDING_BACKENDS: Final = ("gpu",)
_NO_PASS: Final = -1


class GradientSum:
    """The gradient that one use of a tensor kept back for the other, during one backward pass.

    Whoever asks first gets it: the other use, or else the tensor's own backward.
    """

    def __init__(self, shared: Tensor) -> None:
        self._shape, self._dtype = shared.shape, shared.dtype
        self._kept: Tensor | None = None
        self._pass = _NO_PASS

    def keeps(self, gradient: Tensor) -> bool:
        """Takes a new, dense tensor over from the caller, unless it is not of this gradient's kind.

        It must not do so twice in a pass. No tensor is taken outside of a backward pass, nor where
        gradients are to be differentiated, as additions in place would be lost.
        """
        current = torch._C._current_graph_task_id()
        if current == _NO_PASS or torch.is_grad_enabled() or not gradient.is_contiguous():
            return False
        if (gradient.shape, gradient.dtype) != (self._shape, self._dtype):
            return False
        self._kept, self._pass = gradient, current
        return True

    def taken(self) -> Tensor | None:
        """What was kept back in this pass, once; it is the caller's to write to."""
        kept, self._kept = self._kept, None
        return kept if self._pass == torch._C._current_graph_task_id() else None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: GradientSum, shared: Tensor) -> tuple[Tensor, Tensor]:
        ctx.total = total
        ctx.set_materialize_grads(False)
        return shared.view_as(shared), shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None]:
        present = [g for g in (ctx.total.taken(), *gradients) if g is not None]
        return None, functools.reduce(operator.add, present) if present else None


def share(shared: Tensor, *, backend: str) -> tuple[Tensor, Tensor, GradientSum | None]:
    """The tensor for a use that may keep its gradient back, for a matrix product, and their sum.

    The sum is None where nothing can be kept back: for other backends, and without a gradient. Then
    both are the tensor itself.

    Args:
        shared: of any shape.
        backend: a name from `resolve_backend`.
    """
    wanted = torch.is_grad_enabled() and shared.requires_grad
    if backend not in _ADDING_BACKENDS or not wanted or torch.compiler.is_compiling():
        return shared, shared, None
    total = GradientSum(shared)
    first, second = _Share.apply(total, shared)  # type: ignore[no-untyped-call]
    return first, second, total
