"""Gated RMSNorm: every backend against float64; the GPU's kernels' sources run on the CPU."""

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import assert_identical, random_tensor, relative_error
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import TOLERANCE, tolerance
from mamba_dist.ops.gated_rms_norm import gated_rms_norm, gpu
from mamba_dist.ops.nvrtc import rows
from mamba_dist.ops.nvrtc.rows import RowLayout

Inputs = dict[str, Tensor]
BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ["reference", "torch", "gpu"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        return
    monkeypatch.setattr(gpu, "launch", launch_emulated)
    # So that few rows are enough for several of each block.
    monkeypatch.setattr(rows, "_MULTIPROCESSORS", 1)
    # Two rows a block, of 64 threads with 8 elements each.
    monkeypatch.setattr(gpu, "row_layout", lambda width: RowLayout(width, 64, 2, 2, tiles=1))


@pytest.fixture
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wider than what a team has registers for, here 128 elements."""
    monkeypatch.setattr(gpu, "row_layout", lambda width: RowLayout(width, 32, 4, 1, tiles=2))


def made(*shape: int, dtype: torch.dtype = FP32) -> Inputs:
    """Leaves x and z in `dtype`, weight in fp32 or fp64; some gates are 0."""
    z = 2 * random_tensor(*shape, seed=2)
    z[..., ::5] = 0
    weight = 1 + 0.1 * random_tensor(shape[-1], seed=3)
    inputs = {"x": random_tensor(*shape, seed=1).to(dtype), "z": z.to(dtype)}
    inputs["weight"] = weight.to(torch.float64 if dtype == torch.float64 else FP32)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def outcome(
    inputs: Inputs, output_dtype: torch.dtype, *, backend: str, groups: int = 1
) -> dict[str, Tensor]:
    """The output and all gradients for a fixed gradient of the output."""
    normed = gated_rms_norm(
        **inputs, groups=groups, eps=1e-5, output_dtype=output_dtype, backend=backend
    )
    # Rounded to bf16, so that they are the same numbers in every dtype.
    sent = random_tensor(*normed.shape, seed=9).bfloat16().to(normed)
    gradients = torch.autograd.grad(normed, list(inputs.values()), sent)
    named = {f"d {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"normed": normed.detach()} | named


def assert_close(
    inputs: Inputs, output_dtype: torch.dtype, *, backend: str, groups: int = 1
) -> None:
    exact = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    truth = outcome(exact, torch.float64, backend="reference", groups=groups)
    found = outcome(inputs, output_dtype, backend=backend, groups=groups)
    limit = max(TOLERANCE[dtype] for dtype in (inputs["x"].dtype, output_dtype))
    for name, value in truth.items():
        assert relative_error(found[name], value) <= limit, name
    assert found["normed"].dtype == output_dtype
    assert all(found[f"d {name}"].dtype == tensor.dtype for name, tensor in inputs.items())


@each_backend
@pytest.mark.parametrize(("shape", "groups"), [((2, 5, 1), 1), ((61, 266), 2), ((9, 21), 3)])
def test_bf16_of_any_width_equals_float64(
    shape: tuple[int, ...], groups: int, backend: str
) -> None:
    assert_close(made(*shape, dtype=BF16), BF16, backend=backend, groups=groups)


@each_backend
@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize(("shape", "groups"), [((2, 5, 20), 1), ((61, 256), 2), ((17, 2056), 1)])
def test_fp32_rows_too_wide_for_registers_equal_float64(
    shape: tuple[int, ...], groups: int, backend: str
) -> None:
    assert_close(made(*shape), FP32, backend=backend, groups=groups)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("first", [0, 3, 4])
def test_rows_that_are_views_of_wider_ones_give_the_same_bits(first: int) -> None:
    inputs, part = made(6, 20), slice(first, first + 20)
    views = dict(inputs)
    for name in ("x", "z"):
        wide = torch.full((6, 28), torch.nan)
        wide[:, part] = inputs[name].detach()
        views[name] = wide[:, part].requires_grad_()
    assert_identical(outcome(views, FP32, backend="gpu"), outcome(inputs, FP32, backend="gpu"))


@each_backend
def test_autocast_changes_no_bit(backend: str) -> None:
    plain = outcome(made(4, 21, dtype=BF16), BF16, backend=backend)
    with torch.autocast("cpu", BF16):
        found = outcome(made(4, 21, dtype=BF16), BF16, backend=backend)
    assert_identical(found, plain)


@each_backend
@pytest.mark.usefixtures("several_tiles")
def test_half_precision_is_computed_in_fp32(backend: str) -> None:
    inputs = made(4, 20, dtype=torch.float16)
    half = outcome(inputs, torch.float16, backend=backend)
    wide = inputs | {name: inputs[name].float() for name in ("x", "z")}
    assert torch.equal(half["normed"], outcome(wide, FP32, backend=backend)["normed"].half())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["torch", "gpu"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("width", "groups"), [(33, 1), (768, 1), (4096, 8), (4096, 1), (9000, 1)])
def test_a_gpu_agrees_with_float64(
    width: int, groups: int, dtype: torch.dtype, backend: str
) -> None:
    inputs = made(2, 130, width, dtype=dtype)
    moved = {n: t.detach().cuda().requires_grad_() for n, t in inputs.items()}
    exact = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    truth = outcome(exact, torch.float64, backend="reference", groups=groups)
    found = outcome(moved, dtype, backend=backend, groups=groups)
    limit = tolerance(dtype, device_type="cuda")
    assert all(relative_error(found[name], value) <= limit for name, value in truth.items())


def test_fp64_is_refused_by_the_gpu_with_a_remedy() -> None:
    with pytest.raises(BackendError, match=r"fp64.*ops_backend: torch"):
        outcome(made(2, 8, dtype=torch.float64), torch.float64, backend="gpu")


@pytest.mark.usefixtures("several_tiles")
def test_a_second_derivative_of_the_gpus_is_refused() -> None:
    inputs = made(2, 20)
    normed = gated_rms_norm(**inputs, groups=1, eps=1e-5, output_dtype=FP32, backend="gpu")
    (gradient,) = torch.autograd.grad(normed.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"z": torch.ones(2, 5)}, r"z has shape \(2, 5\), expected \(2, 6\)"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(6,\)"),
        ({"groups": 4}, "6 channels do not fall into 4 groups"),
        ({"output_dtype": torch.int32}, "output_dtype is torch.int32, expected a floating-point"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(2, 6), "z": torch.ones(2, 6), "weight": torch.ones(6)}
    options = {"groups": 1, "eps": 1e-5, "output_dtype": FP32}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**arguments | options | changed)  # type: ignore[arg-type]
