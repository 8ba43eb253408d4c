"""The GPU's residual add and RMSNorm, its kernels' sources run on the CPU, against float64."""

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import TOLERANCE, assert_identical, relative_error
from test_rms_norm import assert_close, made, outcome

from mamba_dist.errors import BackendError
from mamba_dist.ops.nvrtc import rows
from mamba_dist.ops.nvrtc.rows import RowLayout
from mamba_dist.ops.rms_norm import add_rms_norm, gpu

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "launch", launch_emulated)
    # So that few rows are enough for several of each block.
    monkeypatch.setattr(rows, "_MULTIPROCESSORS", 1)


@pytest.fixture
def several_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a block, of 64 threads with 8 elements each."""
    monkeypatch.setattr(gpu, "row_layout", lambda width: RowLayout(width, 64, 2, 2, tiles=1))


@pytest.fixture
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wider than what a team has registers for, here 128 elements."""
    monkeypatch.setattr(gpu, "row_layout", lambda width: RowLayout(width, 32, 4, 1, tiles=2))


@pytest.mark.usefixtures("several_warps")
@pytest.mark.parametrize("shape", [(2, 5, 1), (9, 7), (61, 133), (3, 511)])
def test_bf16_of_any_width_equals_float64(shape: tuple[int, ...]) -> None:
    assert_close(made(*shape, dtype=BF16), BF16, "gpu")


@pytest.mark.parametrize("shape", [(2, 5, 20), (61, 128)])
def test_a_stream_that_begins_equals_float64(shape: tuple[int, ...]) -> None:
    assert_close(made(*shape, with_residual=False), BF16, "gpu")


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("shape", [(2, 5, 20), (61, 128), (17, 2056)])
def test_fp32_rows_too_wide_for_registers_equal_float64(shape: tuple[int, ...]) -> None:
    assert_close(made(*shape), FP32, "gpu")


@pytest.mark.usefixtures("several_warps")
def test_only_what_is_wanted_of_the_gradients_is_the_same() -> None:
    x, residual, weight = made(4, 33, dtype=BF16)
    assert residual is not None
    normed, _ = add_rms_norm(x, residual, weight, eps=1e-5, output_dtype=BF16, backend="reference")
    (truth,) = torch.autograd.grad(normed.sum(), x)
    normed, _ = add_rms_norm(
        x, residual.detach(), weight, eps=1e-5, output_dtype=BF16, backend="gpu"
    )
    (gradient,) = torch.autograd.grad(normed.sum(), x)
    assert gradient.dtype == BF16
    assert relative_error(gradient, truth) <= TOLERANCE[BF16]


def test_a_bf16_stream_that_begins_is_widened() -> None:
    x, _, weight = made(4, 33, dtype=BF16)
    normed, stream = add_rms_norm(x, None, weight, eps=1e-5, output_dtype=BF16, backend="gpu")
    truth = add_rms_norm(x, None, weight, eps=1e-5, output_dtype=FP32, backend="reference")[0]
    assert torch.equal(stream, x.float())
    assert relative_error(normed, truth) <= TOLERANCE[BF16]


@pytest.mark.usefixtures("several_tiles")
def test_a_stream_alone_passes_its_gradient_on() -> None:
    x, residual, weight = made(4, 20)
    _, stream = add_rms_norm(x, residual, weight, eps=1e-5, output_dtype=FP32, backend="gpu")
    (gradient,) = torch.autograd.grad((stream**2).sum(), x)
    assert torch.equal(gradient, 2 * stream)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("first", [0, 3, 4])
def test_rows_that_are_views_of_wider_ones_give_the_same_bits(first: int) -> None:
    x, residual, weight = made(6, 20)
    assert residual is not None
    part = slice(first, first + 20)
    views = []
    for tensor in (x, residual):
        wide = torch.full((6, 28), torch.nan)
        wide[:, part] = tensor.detach()
        views.append(wide[:, part].requires_grad_())
    found = outcome((views[0], views[1], weight), FP32, backend="gpu")
    assert_identical(found, outcome((x, residual, weight), FP32, backend="gpu"))


@pytest.mark.parametrize("width", [1, 4, 127, 128, 768, 2048, 2056, 2560, 4096, 8192, 8193, 50000])
def test_a_layout_has_room_for_every_element(width: int) -> None:
    layout = rows.row_layout(width)
    tile = 4 * layout.team * layout.held
    assert tile * (layout.tiles - 1) < width <= tile * layout.tiles
    assert layout.threads <= 512
    assert layout.held <= 4
    assert (layout.tiles > 1) == (width > 8192)


@pytest.mark.usefixtures("several_tiles")
def test_half_precision_is_computed_in_fp32() -> None:
    x, residual, weight = made(4, 20, dtype=torch.float16)
    half = add_rms_norm(x, residual, weight, eps=1e-5, output_dtype=torch.float16, backend="gpu")
    full = add_rms_norm(x.float(), residual, weight, eps=1e-5, output_dtype=FP32, backend="gpu")
    assert torch.equal(half[0], full[0].half())
    assert torch.equal(half[1], full[1])


def test_fp64_is_refused_with_a_remedy() -> None:
    with pytest.raises(BackendError, match=r"fp64.*ops_backend: torch"):
        outcome(made(2, 8, dtype=torch.float64), torch.float64, backend="gpu")


@pytest.mark.usefixtures("several_warps")
def test_a_second_derivative_is_refused() -> None:
    inputs = made(2, 33, dtype=BF16)
    normed, stream = add_rms_norm(*inputs, eps=1e-5, output_dtype=BF16, backend="gpu")
    (gradient,) = torch.autograd.grad((normed * stream).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        gradient.sum().backward()
