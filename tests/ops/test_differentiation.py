"""What the ops do when they are differentiated or traced in ways that they do not support."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_comparison import random_tensor
from torch import Tensor
from torch.autograd import forward_ad

from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.linear import cpu, linear
from mamba_dist.ops.rms_norm import add_rms_norm
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

Function = Callable[[Tensor], Tensor]
LENGTH, WIDTH = 6, 4
each_backend = pytest.mark.parametrize("backend", ["torch", "cpu"])


def fp32(*shape: int, seed: int) -> Tensor:
    return random_tensor(*shape, seed=seed).float()


def functions(backend: str) -> dict[str, Function]:
    """By name, each op as a function of its first input x (1, LENGTH, WIDTH) alone."""
    delta, A = fp32(1, LENGTH, WIDTH, seed=1).abs(), -fp32(WIDTH, 3, seed=2).exp()
    B, C = fp32(1, LENGTH, 1, 3, seed=3), fp32(1, LENGTH, 1, 3, seed=4)
    taps, weight = fp32(WIDTH, 4, seed=5), fp32(7, WIDTH, seed=6)
    labels = torch.arange(LENGTH)[None]
    return {
        "selective_scan": lambda x: selective_scan(x, delta, A, B, C, backend=backend),
        "ssd": lambda x: ssd(x[..., None], delta, A[:, 0], B, C, backend=backend).squeeze(-1),
        "causal_conv1d": lambda x: causal_conv1d(x, taps, activation="silu", backend=backend),
        "linear_cross_entropy": lambda x: linear_cross_entropy(x, weight, labels, backend=backend),
    }


OPS = tuple(functions("cpu"))
each_op = pytest.mark.parametrize("op", OPS)


def inputs() -> Tensor:
    return fp32(1, LENGTH, WIDTH, seed=7).requires_grad_()


def curvature(function: Function, x: Tensor) -> Tensor:
    """Gradient of |gradient|^2 + |x|^2: the second term reaches x without the op's gradient."""
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + x.square().sum(), x)
    return second


@each_backend
@each_op
def test_a_second_derivative_is_refused_and_never_left_out(op: str, backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"no derivative of its own|no autograd formula"):
        curvature(functions(backend)[op], inputs())


@each_backend
@each_op
def test_a_gradient_that_could_be_differentiated_is_the_same(op: str, backend: str) -> None:
    x = inputs()
    function = functions(backend)[op]
    plain, kept = (
        torch.autograd.grad(function(x).square().sum(), x, create_graph=create)[0]
        for create in (False, True)
    )
    assert torch.equal(plain, kept)


@pytest.mark.parametrize("onednn", [False, True])
def test_a_linear_map_has_second_derivatives(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_PREFERS_ONEDNN", onednn)
    weight = fp32(7, WIDTH, seed=6)
    found = curvature(lambda x: linear(x, weight, backend="cpu").sin(), inputs())
    truth = curvature(lambda x: F.linear(x, weight).sin(), inputs())
    assert torch.allclose(found, truth, rtol=1e-4)


def test_a_widened_linear_map_has_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_HAS_BF16", False)
    weight, x = fp32(7, WIDTH, seed=6).bfloat16(), inputs().detach().bfloat16().requires_grad_()
    found = curvature(lambda x: linear(x, weight, backend="cpu").sin(), x)
    truth = curvature(
        lambda x: F.linear(x, weight.float()).sin(), x.detach().float().requires_grad_()
    )
    assert torch.allclose(found.float(), truth, rtol=0.05, atol=0.05 * float(truth.abs().max()))


@each_op
def test_forward_mode_is_refused_and_never_gives_zero(op: str) -> None:
    x = inputs().detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=f"{op} has no forward-mode derivative"):
            functions("cpu")[op](dual)
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(functions("cpu")[op], (x,), (torch.ones_like(x),))


def test_the_norm_refuses_forward_mode() -> None:
    x, weight = inputs().detach(), torch.ones(WIDTH)
    with pytest.raises(NotImplementedError, match="add_rms_norm has no forward-mode"):
        torch.func.jvp(
            lambda x: add_rms_norm(x, None, weight, eps=1e-5, output_dtype=x.dtype, backend="cpu"),
            (x,),
            (torch.ones_like(x),),
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("onednn", [False, True])
@each_op
def test_a_jit_trace_computes_what_it_was_traced_from(
    op: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_PREFERS_ONEDNN", onednn)
    function, x = functions("cpu")[op], inputs().detach()
    traced = torch.jit.trace(function, (x,), check_trace=False)
    assert torch.equal(traced(2 * x), function(2 * x))


@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv1d"])
def test_a_batch_of_calls_by_vmap_equals_the_calls(op: str) -> None:
    function, x = functions("cpu")[op], fp32(3, 1, LENGTH, WIDTH, seed=8)
    assert torch.equal(torch.func.vmap(function)(x), torch.stack([function(row) for row in x]))


@each_backend
@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv1d"])
def test_documents_on_another_device_are_refused(op: str, backend: str) -> None:
    ids = torch.zeros(1, LENGTH, dtype=torch.int32, device="meta")
    A, B = -torch.ones(WIDTH, 3), torch.ones(1, LENGTH, 1, 3)
    x, options = inputs(), {"seq_idx": ids, "backend": backend}
    calls = {
        "selective_scan": lambda: selective_scan(x, x, A, B, B, **options),
        "ssd": lambda: ssd(x[..., None], x, A[:, 0], B, B, **options),
        "causal_conv1d": lambda: causal_conv1d(x, torch.ones(WIDTH, 4), **options),
    }
    with pytest.raises(ValueError, match="different devices"):
        calls[op]()


@each_backend
def test_labels_on_another_device_are_refused(backend: str) -> None:
    labels = torch.zeros(1, LENGTH, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="different devices"):
        linear_cross_entropy(inputs(), torch.ones(7, WIDTH), labels, backend=backend)
