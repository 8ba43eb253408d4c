"""The GPU's product of a few rows, its kernel's source run on the CPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated_kernels import launch_emulated
from op_comparison import random_tensor, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.linear import gpu as linear_gpu
from mamba_dist.ops.linear import gpu_few_rows as gpu
from mamba_dist.ops.linear import linear


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "launch", launch_emulated)


def tensors(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias in bf16."""
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (
        random_tensor(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes)
    )
    return x, weight, bias


# Teams of a part of a warp, of a warp and of many; pieces that are none of the last thread's.
SIZES = ((8, 40), (24, 1), (128, 33), (1160, 9), (2048, 3))
# Each number of rows with teams of a part of a warp and of many: each pair is compiled again.
PAIRS = {(1, 8), (1, 2048), (3, 24), (3, 1160), (4, 128), (4, 1160)}


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        pytest.param(rows, *sizes, marks=() if (rows, sizes[0]) in PAIRS else pytest.mark.slow)
        for rows in (1, 3, 4)
        for sizes in SIZES
    ],
)
def test_products_and_their_bias_agree(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = tensors(rows, inputs, outputs)
    expected = x.double() @ weight.double().T
    found = gpu.product_of_few_rows(x, weight, None)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) <= tolerance(torch.bfloat16)
    found = gpu.product_of_few_rows(x, weight, bias)
    assert relative_error(found, expected + bias.double()) <= tolerance(torch.bfloat16)


def test_many_outputs_have_a_warp_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_THREADS_WANTED", 0)
    x, weight, bias = tensors(2, 2600, 11)
    found = gpu.product_of_few_rows(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    assert relative_error(found, expected) <= tolerance(torch.bfloat16)


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    x, weight, _ = tensors(3, 64, 5)
    wide = torch.full((3, 1, 80), torch.nan, dtype=torch.bfloat16)
    part = wide[..., 8:72].copy_(x[:, None])
    rows = gpu.few_rows(part, weight, None)
    assert rows is not None
    assert rows.data_ptr() == part.data_ptr()
    found = gpu.product_of_few_rows(rows, weight, None)
    assert torch.equal(found, gpu.product_of_few_rows(x, weight, None))


def test_what_the_kernel_cannot_compute_goes_to_torch() -> None:
    x, weight, bias = tensors(2, 64, 5)
    assert gpu.few_rows(x, weight, bias) is not None
    assert gpu.few_rows(x[None], weight, bias) is not None
    with torch.autocast("cpu", torch.float16):
        assert gpu.few_rows(x, weight, None) is None
    many = x.repeat(3, 1)
    misaligned = torch.zeros(2, 72, dtype=torch.bfloat16)[:, 1:65]
    for other in (x.float(), many, misaligned, x.T.contiguous().T, x.clone().requires_grad_()):
        assert gpu.few_rows(other, weight, None) is None
    assert gpu.few_rows(x, weight.T.contiguous().T, None) is None
    assert gpu.few_rows(x, weight, bias.float()) is None
    assert gpu.few_rows(x[:, :60], weight[:, :60].contiguous(), None) is None
    # A mistake is torch's to report.
    with pytest.raises(RuntimeError):
        linear(x[:, :32], weight, backend="gpu")


def test_a_few_rows_take_the_kernel_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def launch(*arguments: Any, **options: Any) -> None:
        launches.append(1)
        launch_emulated(*arguments, **options)

    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(linear_gpu, "_is_on_gpu", lambda _: True)
    x, weight, bias = tensors(4, 64, 5)
    found = linear(x[None], weight, bias, backend="gpu")
    assert (found.shape, len(launches)) == ((1, 4, 5), 1)
    assert relative_error(found, F.linear(x[None].double(), weight.double(), bias.double())) < 6e-3
    assert torch.equal(
        linear(x.repeat(2, 1), weight, backend="gpu"), F.linear(x.repeat(2, 1), weight)
    )
    assert len(launches) == 1


def test_whoever_looks_at_operators_sees_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_gpu, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "launch", None)
    x, weight, _ = tensors(2, 64, 5)

    def product(x: Tensor) -> Tensor:
        return linear(x, weight, backend="gpu")

    with FlopCounterMode(display=False) as counted:
        product(x)
    assert counted.get_total_flops() == 2 * 2 * 64 * 5
    with forward_ad.dual_level():
        y = product(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None
    assert torch.vmap(product)(x).shape == (2, 5)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    for rows in (1, 2, 3):
        assert compiled(x[:1].repeat(rows, 1)).shape == (rows, 5)


def test_wrong_or_broadcast_operands_are_torch_s_to_judge() -> None:
    x, weight, bias = tensors(2, 64, 5)
    for other in (bias[:3], bias[:1], bias.repeat(2, 1)):
        assert gpu.few_rows(x, weight, other) is None
    for other in (weight[0], weight[:0], weight.to("meta")):
        assert gpu.few_rows(x, other, None) is None
    assert gpu.few_rows(x[:, :0], weight[:, :0], None) is None
