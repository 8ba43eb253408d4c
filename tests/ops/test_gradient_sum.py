"""A gradient kept back for a matrix product to add onto: the sum is that of autograd."""

from typing import Any

import pytest
import torch
from op_comparison import random_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_dist.ops.gradient_sum import GradientSum, share
from mamba_dist.ops.linear import linear

INPUTS, OUTPUTS = 6, 4


class Kept(torch.autograd.Function):
    """factor * x, whose backward lets its gradient be kept back, as the scan does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, total: GradientSum | None) -> Tensor:
        ctx.factor, ctx.total = factor, total
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        gradient = grad * ctx.factor
        kept = ctx.total is not None and ctx.total.keeps(gradient)
        return None if kept else gradient, None, None


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = random_tensor(2, 3, INPUTS, seed=1).to(dtype).requires_grad_()
    return x, random_tensor(OUTPUTS, INPUTS, seed=2).to(dtype).requires_grad_()


def scanned(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """As in Mamba-1: what the product gives is an input of the op that keeps its gradient back."""
    first, second, total = share(x, backend=backend)
    projected = linear(second, weight, grad_x_onto=total, backend=backend)
    kept: Tensor = Kept.apply(first, 3.0, total)
    return (kept.sin() * projected.sum(-1, keepdim=True)).square().sum()


def gradients(backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, weight = inputs(dtype)
    return torch.autograd.grad(scanned(x * 1, weight, backend), (x, weight))


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
        assert own.dtype == other.dtype


def test_the_sum_is_that_of_autograd_and_no_addition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    original = GradientSum.taken

    def taken(self: GradientSum) -> Tensor | None:
        sums.append(original(self))
        return sums[-1]

    monkeypatch.setattr(GradientSum, "taken", taken)
    assert_close(gradients("gpu"), gradients("torch"))
    # The product's backward took it, and the shared tensor's found none.
    assert [kept is not None for kept in sums] == [True, False]


def test_a_sum_is_rounded_no_worse_than_by_autograd() -> None:
    x = random_tensor(1, 512, 64, seed=1).bfloat16()
    weight = random_tensor(32, 64, seed=2).bfloat16()
    grad_kept = random_tensor(1, 512, 64, seed=3).bfloat16()
    grad_y = random_tensor(1, 512, 32, seed=4).bfloat16()
    exact = grad_kept.double() + grad_y.double() @ weight.double()
    errors = {}
    for backend in ("gpu", "torch"):
        own = x.clone().requires_grad_()
        first, second, total = share(own, backend=backend)
        y = linear(second, weight, grad_x_onto=total, backend=backend)
        kept = Kept.apply(first, 1.0, total)
        (gradient,) = torch.autograd.grad((y, kept), own, (grad_y, grad_kept))
        errors[backend] = (gradient.double() - exact).norm() / exact.norm()
    assert errors["gpu"] <= errors["torch"]


def test_two_backwards_of_one_graph_and_a_partial_one_before_them() -> None:
    x, weight = inputs()
    loss = scanned(x * 1, weight, "gpu")
    expected = gradients("torch")
    # Leaves a gradient behind that nobody takes.
    torch.autograd.grad(loss, weight, retain_graph=True)
    for _ in range(2):
        assert_close(torch.autograd.grad(loss, (x, weight), retain_graph=True), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_gives_the_same(reentrant: bool) -> None:
    x, weight = inputs()
    loss = checkpoint(scanned, x * 1, weight, "gpu", use_reentrant=reentrant)
    loss.backward()
    assert_close((x.grad, weight.grad), gradients("torch"))


@pytest.mark.parametrize("used", ["kept", "projected", "neither at once"])
def test_a_gradient_that_the_product_does_not_take_is_not_lost(used: str) -> None:
    results = []
    for backend in ("gpu", "torch"):
        x, weight = inputs()
        first, second, total = share(x * 1, backend=backend)
        projected = linear(second, weight, grad_x_onto=total, backend=backend)
        kept: Tensor = Kept.apply(first, 3.0, total)
        terms = {
            "kept": kept.square().sum(),
            "projected": projected.square().sum(),
            # The product's backward is made to run first.
            "neither at once": kept.square().sum() + projected.square().sum(),
        }
        results.append(torch.autograd.grad(terms[used], x))
    assert_close(*results)


def test_nothing_is_kept_back_where_gradients_are_differentiated() -> None:
    results = []
    for backend in ("gpu", "torch"):
        x, weight = inputs(torch.float64)
        loss = scanned(x * 1, weight, backend)
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        second = sum(gradient.square().sum() for gradient in first)
        results.append(torch.autograd.grad(second, (x, weight)))
    assert_close(*results)


@pytest.mark.parametrize("autocast_backward", [False, True])
def test_autocast_gives_what_it_gives_elsewhere(autocast_backward: bool) -> None:
    results = []
    for backend in ("gpu", "torch"):
        x, weight = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            first, second, total = share(x.bfloat16(), backend=backend)
            y = linear(second, weight, grad_x_onto=total, backend=backend)
            kept = Kept.apply(first, 3.0, total)
        assert y.dtype == torch.bfloat16
        loss = (y.float().square().sum(-1, keepdim=True) * kept.float()).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_backward):
            results.append(torch.autograd.grad(loss, (x, weight)))
    for own, other in zip(*results, strict=True):
        assert own.dtype == other.dtype
        assert (own - other).abs().max() <= 2**-6 * other.abs().max()
    # The weight's is no sum, and so the same bits.
    assert torch.equal(results[0][1], results[1][1])


def test_a_gradient_of_another_kind_is_not_kept() -> None:
    x, _ = inputs()
    total = GradientSum(x)
    assert not total.keeps(torch.zeros_like(x))
    answers = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            others = (grad.bfloat16(), grad.flatten(), grad.mT.contiguous().mT, grad.clone())
            answers.extend(total.keeps(other) for other in others)
            return grad

    Asking.apply(x).sum().backward()
    assert answers == [False, False, False, True]
    # And it is gone with its pass.
    assert total.taken() is None


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "cuda"])
def test_other_backends_share_nothing(backend: str) -> None:
    x, _ = inputs()
    first, second, total = share(x, backend=backend)
    assert first is x
    assert second is x
    assert total is None


def test_without_a_gradient_nothing_is_shared() -> None:
    x, _ = inputs()
    assert share(x.detach(), backend="gpu")[2] is None
    with torch.no_grad():
        assert share(x, backend="gpu")[2] is None
