"""Gradients without a derivative of their own, which say so where torch would leave it out.

torch's `once_differentiable` raises only where the gradient's graph is walked for its own sake: a
second derivative that has another path to the inputs loses this one without a word.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's `backward` whose results raise RuntimeError when they are differentiated.

    It finds what they depend on in `ctx.saved_tensors`: every differentiable input has to be saved.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *output_gradients: Tensor | None) -> Any:
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(unpacked, *output_gradients)
        # A compiler traces a backward to run it, not to differentiate it.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        gradients = results if isinstance(results, tuple) else (results,)
        present = [gradient for gradient in gradients if gradient is not None]
        sources = [
            tensor
            for tensor in (*unpacked.saved_tensors, *output_gradients)
            if tensor is not None and tensor.requires_grad
        ]
        name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
        marked = iter(_NoDerivative.apply(name, len(present), *present, *sources))  # type: ignore[no-untyped-call]
        return tuple(None if gradient is None else next(marked) for gradient in gradients)

    return checked


class _Unpacked:
    """A Function's context whose saved tensors are asked for once.

    Activation checkpointing computes them again at the question, and refuses a second one.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors: tuple[Any, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"the gradient of {ctx.name} has no derivative of its own; use backend='reference' for "
            "second-order gradients"
        )
