"""The linear map: every backend gives torch's products and gradients."""

import pytest
import torch
import torch.nn.functional as F
from op_comparison import random_tensor, relative_error

from mamba_dist.ops.linear import cpu, linear

BACKENDS = ["torch", "cpu"]


@pytest.fixture(autouse=True, params=[False, True], ids=["MKL", "oneDNN"])
def _library_of_fp32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries, whichever one this machine would choose."""
    monkeypatch.setattr(cpu, "_PREFERS_ONEDNN", request.param)


def arguments(*leading: int, bias: bool) -> list[torch.Tensor | None]:
    tensors = [random_tensor(*leading, 24, seed=1), random_tensor(10, 24, seed=2)]
    values: list[torch.Tensor | None] = [t.float().requires_grad_() for t in tensors]
    return [*values, random_tensor(10, seed=3).float().requires_grad_() if bias else None]


def outcome(function, values, **options):  # type: ignore[no-untyped-def]
    y = function(*values, **options)
    leaves = [v for v in values if v is not None]
    gradient = random_tensor(*y.shape, seed=4).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 65), (1, 1)])
def test_product_and_all_gradients_equal_float64(
    leading: tuple[int, ...], bias: bool, backend: str
) -> None:
    values = arguments(*leading, bias=bias)
    wide = [None if v is None else v.detach().double().requires_grad_() for v in values]
    for found, truth in zip(
        outcome(linear, values, backend=backend), outcome(F.linear, wide), strict=True
    ):
        assert found.shape == truth.shape
        assert found.dtype == torch.float32
        assert relative_error(found, truth) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_of_a_wider_tensor_gives_the_same_bits(backend: str) -> None:
    x, weight, bias = arguments(3, 40, bias=True)
    assert x is not None
    sliced = torch.cat([x, x], dim=-1).detach()[..., :24].requires_grad_()
    assert not sliced.is_contiguous()
    for found, expected in zip(
        outcome(linear, [sliced, weight, bias], backend=backend),
        outcome(linear, [x, weight, bias], backend=backend),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.fixture(params=[False, True], ids=["bf16 as found", "bf16 emulated"])
def _bf16_of_the_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(cpu, "_HAS_BF16", False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(3,), (2, 1030)], ids=str)
@pytest.mark.usefixtures("_bf16_of_the_machine")
def test_autocast_gives_bf16_and_gradients_in_the_dtypes_of_the_inputs(
    leading: tuple[int, ...], input_dtype: torch.dtype, bias: bool, backend: str
) -> None:
    x, *parameters = arguments(*leading, bias=bias)
    assert x is not None
    values = [x.detach().to(input_dtype).requires_grad_(), *parameters]
    wide = [None if v is None else v.detach().double().requires_grad_() for v in values]
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(linear, values, backend=backend)
    expected = outcome(F.linear, wide)
    dtypes = [torch.bfloat16, *(v.dtype for v in values if v is not None)]
    assert [tensor.dtype for tensor in found] == dtypes
    for ours, truth in zip(found, expected, strict=True):
        assert relative_error(ours, truth) < 6e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("_bf16_of_the_machine")
def test_bf16_tensors_give_bf16_without_autocast(backend: str) -> None:
    values = [
        None if v is None else v.detach().bfloat16().requires_grad_()
        for v in arguments(2, 40, bias=True)
    ]
    wide = [None if v is None else v.detach().double().requires_grad_() for v in values]
    found = outcome(linear, values, backend=backend)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    for ours, truth in zip(found, outcome(F.linear, wide), strict=True):
        assert relative_error(ours, truth) < 6e-3


def test_widened_products_are_closer_to_the_truth_than_rounded_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "_HAS_BF16", False)
    x, weight, _ = arguments(200, bias=False)
    assert x is not None
    assert weight is not None
    narrow = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = linear(narrow, weight, backend="cpu")
        rounded = F.linear(narrow, weight)
    truth = F.linear(narrow.double(), weight.detach().double())
    assert relative_error(found, truth) < 0.8 * relative_error(rounded, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_wanted_gradients_are_computed(backend: str) -> None:
    x, weight, bias = arguments(5, bias=True)
    assert x is not None
    assert weight is not None
    linear(x.detach(), weight, bias, backend=backend).sum().backward()
    assert weight.grad is not None
    linear(x, weight.detach(), None, backend=backend).sum().backward()
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(5, 24), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("_bf16_of_the_machine")
def test_the_result_can_be_changed_in_place(backend: str, dtype: torch.dtype) -> None:
    """As logits are, at the ids that are padding."""
    x, weight, _ = (None if v is None else v.to(dtype) for v in arguments(2, 5, bias=False))
    assert x is not None
    y = linear(x, weight, backend=backend)
    y[..., 7:] = 0
    x.retain_grad()
    y.sum().backward()
    assert relative_error(x.grad, weight.double()[:7].sum(0).expand(2, 5, 24)) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("_bf16_of_the_machine")
def test_maps_without_rows_or_features_give_what_torch_gives(
    backend: str, dtype: torch.dtype
) -> None:
    for rows, inputs, outputs in (((0,), 24, 10), ((2, 0), 24, 10), ((3,), 0, 10), ((), 24, 10)):
        x = torch.ones(*rows, inputs, dtype=dtype, requires_grad=True)
        weight = torch.ones(outputs, inputs, dtype=dtype, requires_grad=True)
        y = linear(x, weight, backend=backend)
        assert torch.equal(y, F.linear(x, weight))
        y.sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_keep_their_precision(backend: str) -> None:
    x, weight = random_tensor(4, 24, seed=1), random_tensor(10, 24, seed=2)
    assert torch.equal(linear(x, weight, backend=backend), F.linear(x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiler_traces_it_without_a_break(backend: str) -> None:
    values = arguments(2, 9, bias=True)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        outcome(compiled, values, backend=backend),
        outcome(linear, values, backend=backend),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_do_not_fit_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError):
        linear(torch.ones(2, 5), torch.ones(3, 4), backend=backend)
