"""The head's cross entropy in plain PyTorch, some tokens at a time.

The loss is a sum, so its gradient is known up to one factor as soon as a chunk's softmax is: the
forward computes the gradients chunk by chunk and the backward multiplies them by the factor. Three
matmuls instead of the four of recomputation, for an fp32 gradient of the weight that lives from
forward to backward (the idea of Liger Kernel, arXiv 2410.10989, section 3.2).

V4096 D256 and 2,048 tokens on one core: 163 ms, where F.linear and F.cross_entropy take 220.

T tokens (B L), D d_model, V rows of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.native.call import refuse_tangents
from mamba_dist.ops.precision import autocast_disabled, compute_dtype

_IGNORED_LABEL = -100
# Logits of one chunk: 8 MiB in fp32 on CPU, 256 MiB on an accelerator, which wants larger matmuls.
_CPU_LOGITS = 1 << 21
_ACCELERATOR_LOGITS = 1 << 26
# Fewer rows than this make the matmuls slow.
_SHORTEST_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Pieces:
    """What another backend may do in its own way.

    product_dtype: the dtype that the matmuls would have -> the one that they are computed in.
    product: x (t, I) and weight (O, I), both of that dtype -> x @ weight^T (t, O).
    softmax_loss: logits (t, V), which it may overwrite, targets (t,) and whether the gradient is
        wanted -> losses (t,) in fp32 or fp64, and the gradient (t, V) in any dtype.
    """

    product_dtype: Callable[[torch.dtype], torch.dtype]
    product: Callable[[Tensor, Tensor], Tensor]
    softmax_loss: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Plan:
    """How a call computes: the softmax's rows and the matmuls' dtype."""

    pieces: Pieces
    vocab_size: int
    matmul_dtype: torch.dtype


LossAndGradients = tuple[Tensor, Tensor | None, Tensor | None]
"""The loss, and its gradients for tokens (T, D) and weight (V, D) as far as wanted."""
Forward = Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], LossAndGradients]
"""Tokens, weight, targets (T,) and which of the two gradients are wanted -> what it computes."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Scalar sum of -log p over labels other than -100; arguments as in the package."""
    pieces = Pieces(lambda dtype: dtype, _product, _softmax_loss)
    return chunked(hidden, weight, labels, vocab_size, pieces)


def chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, pieces: Pieces
) -> Tensor:
    """`linear_cross_entropy` out of `pieces`."""
    plan = _Plan(pieces, vocab_size, pieces.product_dtype(matmul_dtype(hidden, weight)))
    return differentiable(hidden, weight, labels, partial(_forward, plan))


def differentiable(hidden: Tensor, weight: Tensor, labels: Tensor, forward: Forward) -> Tensor:
    """The scalar loss of `forward`, which computes the gradients along with it, outside autocast.

    Its gradients may have other dtypes than hidden and weight.
    """
    refuse_tangents("linear_cross_entropy", hidden, weight)
    tokens, targets = hidden.flatten(0, 1), labels.flatten()
    with autocast_disabled(hidden):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                tokens, weight, targets, forward
            )
            return loss
        return forward(tokens, weight, targets, (False, False))[0]


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What autocast or the promotion of both makes of the matmuls."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, targets: Tensor, forward: Forward
    ) -> Tensor:
        loss, grad_tokens, grad_weight = forward(tokens, weight, targets, ctx.needs_input_grad[:2])
        # The inputs only for `first_order`.
        ctx.save_for_backward(grad_tokens, grad_weight, tokens, weight)
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        grad_tokens, grad_weight, tokens, weight = ctx.saved_tensors
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(given.dtype)
            for gradient, given in ((grad_tokens, tokens), (grad_weight, weight))
        ]
        return *scaled, None, None


def _forward(
    plan: _Plan, tokens: Tensor, weight: Tensor, targets: Tensor, wanted: tuple[bool, bool]
) -> LossAndGradients:
    dtype = compute_dtype(tokens)
    head = weight[: plan.vocab_size].to(plan.matmul_dtype)
    # fp64 costs nothing here and makes the sum independent of how tokens fall into chunks.
    loss = torch.zeros((), dtype=torch.float64, device=tokens.device)
    grad_tokens = torch.empty_like(tokens, dtype=dtype) if wanted[0] else None
    grad_weight = torch.empty_like(weight, dtype=dtype) if wanted[1] else None
    if grad_weight is not None:
        # The other rows are written by the first chunk.
        grad_weight[plan.vocab_size :].zero_()
    chunk = _chunk_tokens(tokens, plan.vocab_size)
    for start in range(0, len(tokens), chunk):
        where = slice(start, start + chunk)
        inputs = tokens[where].to(plan.matmul_dtype)
        losses, logits_grad = plan.pieces.softmax_loss(
            plan.pieces.product(inputs, head), targets[where], any(wanted)
        )
        loss += losses.sum(dtype=torch.float64)
        logits_grad = logits_grad.to(plan.matmul_dtype)
        if grad_tokens is not None:
            grad_tokens[where] = plan.pieces.product(logits_grad, head.t())
        if grad_weight is not None:
            add_product(grad_weight[: plan.vocab_size], logits_grad, inputs, is_first=start == 0)
    return loss.to(dtype), grad_tokens, grad_weight


def add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Adds left^T @ right to `total`, or overwrites it in the first chunk."""
    # In one call where the dtypes allow it: no second (V, D) for the product.
    if left.dtype == total.dtype:
        torch.addmm(total, left.t(), right, beta=int(not is_first), out=total)
    elif is_first:
        total.copy_(left.t() @ right)
    else:
        total += left.t() @ right


def _chunk_tokens(tokens: Tensor, vocab_size: int) -> int:
    logits = _CPU_LOGITS if tokens.device.type == "cpu" else _ACCELERATOR_LOGITS
    return max(_SHORTEST_CHUNK_TOKENS, logits // vocab_size)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _softmax_loss(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Losses (t,) and their gradient with respect to the logits (t, V), as in `Pieces`."""
    logits = logits.to(compute_dtype(logits))
    ignored = (targets == _IGNORED_LABEL)[:, None]
    labels = targets[:, None].masked_fill(ignored, 0)
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, labels)
    total = logits.exp_().sum(-1, keepdim=True)
    losses = (total.log() - chosen).masked_fill_(ignored, 0.0)
    if not wanted:
        return losses, logits
    gradient = logits.div_(total)
    gradient.scatter_add_(-1, labels, torch.full_like(chosen, -1.0))
    return losses, gradient.masked_fill_(ignored, 0.0)
