"""The GPU's product of a few rows, its kernel's source run on the CPU."""

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import random_tensor, relative_error
from torch import Tensor

from mamba_dist.ops.agreement import tolerance
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
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 40), (24, 1), (128, 33), (1160, 9), (2048, 3)])
@pytest.mark.parametrize("rows", [1, 3, 4])
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
