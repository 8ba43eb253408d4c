"""The limit model: our own language model whose scan and convolution cost next to nothing.

Same parameters, same matrix products, norms, head and loss. Each stand-in reads every large tensor
that the op reads, writes every one that it writes, and computes nothing else; what remains is what
no kernel for the scan or the convolution can save. So the limit is no model of language, and its
results are not checked.

B batch, L length, E channels, N d_state, H heads, P headdim, G groups, K kernel width.
"""

from typing import Any

import torch
from torch import Tensor

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model import layers, mamba1, mamba2
from mamba_dist.model.lm import MambaLM


def limit_model(config: MambaConfig, *, backend: str) -> MambaLM:
    """The limit of `config`; turns every MambaLM of this process into one.

    The norms, the linear layers and the loss are those of `backend`.
    """
    # The stand-ins replace the ops where the mixers look them up: a copy of the mixers would not
    # follow their changes.
    for module, name, stand_in in (
        (mamba1, "selective_scan", _selective_scan),
        (mamba2, "ssd", _ssd),
        (layers, "causal_conv1d", _causal_conv1d),
    ):
        if not hasattr(module, name):
            raise AssertionError(f"{module.__name__} calls no {name} any more; mend the limit")
        setattr(module, name, stand_in)
    return MambaLM(config, backend=backend)


class _Scan(torch.autograd.Function):
    """y = u + delta * z in one pass, and its true gradients."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        """Reads u, delta, z once and writes y once, each (B, L, E)."""
        ctx.save_for_backward(u, delta, B, C, z)
        return torch.addcmul(u, delta, z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Reads u, delta, B, C, z once and y's gradient three times; writes all five gradients.

        Three passes, since eager PyTorch cannot write three tensors in one.
        """
        u, delta, B, C, z = ctx.saved_tensors
        # alpha=0 reads the tensor and adds nothing.
        return torch.add(grad, u, alpha=0), grad * z, B * 0, C * 0, grad * delta


class _Dual(torch.autograd.Function):
    """y = x in one pass; the gradients of dt, B and C are zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Reads x (B, L, H, P) and dt (B, L, H) once, writes y (B, L, H, P) once."""
        ctx.save_for_backward(x, dt, B, C)
        return torch.add(x, dt[..., None], alpha=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Reads x, dt, B, C and y's gradient once, writes all four gradients once."""
        x, dt, B, C = ctx.saved_tensors
        return torch.add(grad, x, alpha=0), dt * 0, B * 0, C * 0


class _Convolution(torch.autograd.Function):
    """y = x in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Reads x (B, L, E) once, writes y once."""
        ctx.save_for_backward(x)
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Reads x and y's gradient once, writes x's gradient once."""
        (x,) = ctx.saved_tensors
        return torch.add(grad, x, alpha=0)


def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **options: Any
) -> Tensor:
    D, z, delta_bias = rest[:3]
    y: Tensor = _Scan.apply(u, delta, B, C, z)  # type: ignore[no-untyped-call]
    return _with_gradients(y, A, D, delta_bias)


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **options: Any
) -> Tensor:
    D, _, dt_bias = rest[:3]
    y: Tensor = _Dual.apply(x, dt, B, C)  # type: ignore[no-untyped-call]
    return _with_gradients(y, A, D, dt_bias)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **options: Any
) -> Tensor:
    y: Tensor = _Convolution.apply(x)  # type: ignore[no-untyped-call]
    return _with_gradients(y, weight, bias)


class _Attach(torch.autograd.Function):
    """y as it is; the parameters get zero gradients, which an optimizer then finds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


def _with_gradients(y: Tensor, *parameters: Tensor | None) -> Tensor:
    present = [parameter for parameter in parameters if parameter is not None]
    attached: Tensor = _Attach.apply(y, *present)  # type: ignore[no-untyped-call]
    return attached
