"""Gradients of a tensor's parts in one buffer: those of a plain split, whoever wrote them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import random_tensor
from scan_cases import scan_arguments
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_dist.ops import joint_gradient
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.causal_conv1d import gpu as conv_gpu
from mamba_dist.ops.gated_rms_norm import gated_rms_norm
from mamba_dist.ops.gated_rms_norm import gpu as norm_gpu
from mamba_dist.ops.joint_gradient import GradientPart, JointGradient, empty_gradient, split
from mamba_dist.ops.selective_scan import gpu_launch, selective_scan

WIDTHS = (8, 12, 4)
SHAPE = (2, 5)


class Scaled(torch.autograd.Function):
    """factor * x, whose backward writes where it is told, as the kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, part: GradientPart | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor, ctx.part = factor, part
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return empty_gradient(x, ctx.part).copy_(grad * ctx.factor), None, None


def scaled(x: Tensor, factor: float, part: GradientPart | None = None) -> Tensor:
    result: Tensor = Scaled.apply(x, factor, part)
    return result


def whole(dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(*SHAPE, sum(WIDTHS), seed=1).to(dtype).requires_grad_()


def weighted(*values: Tensor) -> Tensor:
    """A loss whose gradients differ from element to element."""
    return sum(
        (value * random_tensor(*value.shape, seed=20 + i)).sum() for i, value in enumerate(values)
    )


Parts = Sequence[Tensor]
Places = Sequence[GradientPart | None]


def all_in_place(parts: Parts, places: Places) -> Tensor:
    factors = (2.0, 3.0, 4.0)
    return weighted(*(scaled(*part) for part in zip(parts, factors, places, strict=True)))


def one_elsewhere(parts: Parts, places: Places) -> Tensor:
    return all_in_place(parts, (places[0], None, places[2]))


def none_in_place(parts: Parts, places: Places) -> Tensor:
    return all_in_place(parts, (None, None, None))


def one_unused(parts: Parts, places: Places) -> Tensor:
    return weighted(scaled(parts[1], 3.0, places[1]))


def one_used_twice(parts: Parts, places: Places) -> Tensor:
    return all_in_place(parts, places) + weighted(parts[1].square())


def one_written_twice(parts: Parts, places: Places) -> Tensor:
    return all_in_place(parts, places) + weighted(scaled(parts[1], 7.0, places[1]))


def one_not_contiguous(parts: Parts, places: Places) -> Tensor:
    turned = scaled(parts[0], 3.0).mT.contiguous().mT
    return weighted(turned, scaled(parts[1], 2.0, places[1])) + parts[2].sum()


def split_further(parts: Parts, places: Places) -> Tensor:
    return weighted(
        scaled(parts[0].unflatten(-1, (2, 4)), 2.0, places[0]),
        scaled(parts[1].unflatten(-1, (3, 4)), 3.0, places[1]),
        scaled(parts[2].unsqueeze(2), 4.0, places[2]),
    )


def changed_by_a_hook(parts: Parts, places: Places) -> Tensor:
    parts[1].register_hook(lambda grad: grad * 5)
    return all_in_place(parts, places)


USES = (
    *(all_in_place, one_elsewhere, none_in_place, one_unused, one_used_twice, one_written_twice),
    *(one_not_contiguous, split_further, changed_by_a_hook),
)
every_use = pytest.mark.parametrize("use", USES)
Use = Callable[[Parts, Places], Tensor]


def expected(use: Use, dtype: torch.dtype = torch.float32) -> Tensor:
    x = whole(dtype)
    (gradient,) = torch.autograd.grad(use(x.split(WIDTHS, dim=-1), (None,) * 3), x)
    return gradient


def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that parts are copied into a tensor of their own."""
    calls: list[int] = []
    original = JointGradient._joined

    def count(self: JointGradient, gradients: Sequence[Tensor | None]) -> Tensor:
        calls.append(len(gradients))
        return original(self, gradients)

    monkeypatch.setattr(JointGradient, "_joined", count)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_use
def test_gradients_are_those_of_a_plain_split(use: Use, dtype: torch.dtype) -> None:
    x = whole(dtype)
    (gradient,) = torch.autograd.grad(use(*split(x, WIDTHS, backend="gpu")), x)
    assert torch.equal(gradient, expected(use, dtype))
    assert gradient.is_contiguous()


@every_use
def test_two_backwards_over_one_graph_give_the_same_and_share_no_memory(use: Use) -> None:
    x = whole()
    loss = use(*split(x, WIDTHS, backend="gpu"))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, expected(use))
    assert torch.equal(second, expected(use))


@every_use
def test_a_recomputed_forward_gives_the_same(use: Use) -> None:
    if use is changed_by_a_hook:
        pytest.skip("a hook belongs to the tensor of one forward")
    x = whole()
    parts, places = split(x * 1, WIDTHS, backend="gpu")
    outside = checkpoint(lambda *given: use(given, places), *parts, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(outside, x)[0], expected(use))

    def inside(x: Tensor) -> Tensor:
        return use(*split(x, WIDTHS, backend="gpu"))

    for reentrant in (False, True):
        x = whole()
        loss = checkpoint(inside, x * 1, use_reentrant=reentrant)
        loss.backward()
        assert torch.equal(x.grad, expected(use))


def test_what_the_parts_users_wrote_is_the_gradient_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, written = joined(monkeypatch), []
    original = JointGradient.claim

    def remember(self: JointGradient, *arguments: Any, **options: Any) -> Tensor | None:
        written.append(original(self, *arguments, **options))
        return written[-1]

    monkeypatch.setattr(JointGradient, "claim", remember)
    copies: list[int] = []
    monkeypatch.setattr(Tensor, "copy_", _counting(Tensor.copy_, copies))
    for use in (all_in_place, split_further):
        del copies[:], written[:]
        x = whole()
        (gradient,) = torch.autograd.grad(use(*split(x, WIDTHS, backend="gpu")), x)
        places = [place.untyped_storage().data_ptr() for place in written]
        assert places == [gradient.untyped_storage().data_ptr()] * 3
        # Those by which `Scaled` writes.
        assert len(copies) == 3
    assert calls == []


def _counting(run: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return run(*arguments, **options)

    return counted


@pytest.mark.parametrize("use", [one_elsewhere, one_unused, one_not_contiguous])
def test_only_what_lies_elsewhere_is_copied(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = joined(monkeypatch)
    x = whole()
    torch.autograd.grad(use(*split(x, WIDTHS, backend="gpu")), x)
    assert calls == []


@every_use
def test_a_gradient_that_somebody_holds_is_never_overwritten(use: Use) -> None:
    x = whole()
    parts, places = split(x, WIDTHS, backend="gpu")
    loss = use(parts, places)
    held = [
        gradient
        for gradient in torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        if gradient is not None
    ]

    def hold(gradient: Tensor | None) -> None:
        if gradient is not None:
            held.append(gradient)
            before.append(gradient.clone())

    before = [gradient.clone() for gradient in held]
    for part in parts:
        part.register_hook(hold)
        # Before the hooks of a use that replaces gradients, too.
        part._backward_hooks.move_to_end(next(reversed(part._backward_hooks)), last=False)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(gradient, expected(use))
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))


def test_a_pass_that_ends_before_the_split_leaves_the_next_one_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = joined(monkeypatch)
    x = whole()
    parts, places = split(x, WIDTHS, backend="gpu")
    loss = all_in_place(parts, places)
    torch.autograd.grad(loss, parts[1], retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, expected(all_in_place))
    assert calls == []


def test_a_second_derivative_is_that_of_a_plain_split() -> None:
    results = []
    for backend in ("gpu", "torch"):
        x = whole(torch.float64)
        parts, _ = split(x, WIDTHS, backend=backend)
        loss = sum(part.pow(3 + i).sum() for i, part in enumerate(parts))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.equal(*results)


@pytest.mark.usefixtures("_emulated")
def test_a_second_derivative_that_a_kernel_lacks_is_refused_in_a_place_too() -> None:
    x = random_tensor(2, 9, 48, seed=1).float().requires_grad_()
    parts, places = split(x, (16, 32), backend="gpu")
    loss = weighted(parts[0], convolved(parts[1], grad_x_into=places[1]))
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        first.square().sum().backward()


def test_gradients_of_parts_whose_whole_is_used_besides() -> None:
    results = []
    for backend in ("gpu", "torch"):
        x = whole()
        y = x * 1
        loss = all_in_place(*split(y, WIDTHS, backend=backend)) + weighted(y.square())
        results.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*results)


def test_no_place_is_given_outside_of_a_backward_or_to_another_shape_or_dtype() -> None:
    joint = JointGradient(whole(), WIDTHS)
    assert joint.claim(0, torch.Size((*SHAPE, 8)), torch.float32) is None
    found = {}

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            for name, index, shape, dtype, aligned_to in (
                ("dtype", 0, (*SHAPE, 8), torch.bfloat16, 1),
                ("width", 0, (*SHAPE, 12), torch.float32, 1),
                ("leading", 0, (SHAPE[0] * SHAPE[1], 8), torch.float32, 1),
                ("alignment", 1, (*SHAPE, 12), torch.float32, 16),
                ("fits", 1, (*SHAPE, 12), torch.float32, 4),
                ("again", 1, (*SHAPE, 12), torch.float32, 4),
            ):
                size = torch.Size(shape)
                found[name] = joint.claim(index, size, dtype, aligned_to=aligned_to)
            return grad

    Asking.apply(whole()).sum().backward()
    assert [name for name, place in found.items() if place is not None] == ["fits"]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "cuda"])
def test_other_backends_split_as_torch_does(backend: str) -> None:
    parts, places = split(whole(), WIDTHS, backend=backend)
    assert places == (None,) * 3
    assert {part.grad_fn.name() for part in parts} == {"SplitWithSizesBackward0"}


def test_without_a_gradient_there_are_no_places() -> None:
    assert split(whole().detach(), WIDTHS, backend="gpu")[1] == (None,) * 3
    with torch.no_grad():
        assert split(whole(), WIDTHS, backend="gpu")[1] == (None,) * 3


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conv_gpu, norm_gpu, gpu_launch):
        monkeypatch.setattr(module, "launch", launch_emulated)


def convolved(inner: Tensor, **options: Any) -> Tensor:
    channels = inner.shape[-1]
    weight = random_tensor(channels, 4, seed=2).float()
    y = causal_conv1d(inner, weight, activation="silu", backend="gpu", **options)
    assert isinstance(y, Tensor)
    return y


def scanned(z: Tensor, **options: Any) -> Tensor:
    given = scan_arguments(length=z.shape[1], channels=z.shape[2], d_state=16)
    given |= {name: given[name].to(z.dtype) for name in ("u", "delta", "B", "C")} | {"z": z}
    y = selective_scan(**given, backend="gpu", **options)
    assert isinstance(y, Tensor)
    return y


def normed(z: Tensor, **options: Any) -> Tensor:
    x = random_tensor(*z.shape, seed=5).to(z.dtype)
    weight = random_tensor(z.shape[-1], seed=6).float()
    return gated_rms_norm(
        x, z, weight, groups=2, eps=1e-5, output_dtype=z.dtype, backend="gpu", **options
    )


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "run"),
    [("grad_x_into", convolved), ("grad_z_into", scanned), ("grad_z_into", normed)],
    ids=["causal_conv1d", "selective_scan", "gated_rms_norm"],
)
def test_a_kernel_writes_the_same_bits_into_its_place(
    name: str, run: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = joined(monkeypatch)
    monkeypatch.setattr(
        joint_gradient.torch, "empty", lambda *shape, **kind: torch.full(*shape, torch.nan, **kind)
    )
    # Two steps of the kernels' vectors apart, and rows of more than a tile of steps.
    widths, gradients = (16, 32, 8), []
    for backend in ("gpu", "torch"):
        x = random_tensor(2, 41, sum(widths), seed=1).to(dtype).requires_grad_()
        parts, places = split(x, widths, backend=backend)
        y = run(parts[1], **{name: places[1]})
        loss = weighted(parts[0], y.float(), parts[2])
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*gradients)
    # Of the plain split there is none; the other's kernel wrote, and the other parts were copied.
    assert calls == []


@pytest.mark.usefixtures("_emulated")
def test_rows_that_a_kernel_cannot_write_in_fours_are_copied() -> None:
    gradients = []
    for backend in ("gpu", "torch"):
        x = random_tensor(2, 9, 2 + 32, seed=1).float().requires_grad_()
        (first, z), places = split(x, (2, 32), backend=backend)
        loss = weighted(first, normed(z, grad_z_into=places[1]), scanned(z, grad_z_into=places[1]))
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*gradients)
