"""The GPU's cross entropy of the head, its kernel's source run on the CPU, against float64."""

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import relative_error
from test_cross_entropy import Inputs, cast, expected_loss, head_inputs, with_gradients
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.cross_entropy import gpu, linear_cross_entropy


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "launch", launch_emulated)


def loss_of(inputs: Inputs, vocab_size: int | None = None) -> Tensor:
    return linear_cross_entropy(*inputs, vocab_size=vocab_size, backend="gpu")


def assert_close(inputs: Inputs, vocab_size: int) -> None:
    exact = cast(inputs, torch.float64)
    truth = with_gradients(expected_loss(*exact, vocab_size), *exact[:2])
    loss = loss_of(inputs, vocab_size)
    assert loss.dtype == torch.float32
    found = with_gradients(loss, *inputs[:2])
    limit = tolerance(inputs[0].dtype, through_softmax=True)
    for name, value in truth.items():
        assert relative_error(found[name], value) <= limit, name
        assert name == "loss" or found[name].dtype == inputs[0].dtype
    assert not found["weight"][vocab_size:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "rows"), [(1, 1), (1, 9), (7, 7), (20, 24), (33, 40), (128, 128), (129, 130)]
)
def test_loss_and_gradients_of_any_vocabulary_equal_float64(
    vocab_size: int, rows: int, dtype: torch.dtype
) -> None:
    assert_close(cast(head_inputs(length=9, rows=rows, vocab_size=vocab_size), dtype), vocab_size)


def test_a_row_of_several_warps_and_tiles_equals_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MOST_THREADS", 64)
    inputs = head_inputs(length=4, rows=2056, vocab_size=2050)
    assert_close(cast(inputs, torch.bfloat16), 2050)


def test_several_chunks_of_tokens_equal_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LOGITS_BYTES", 1)
    assert_close(cast(head_inputs(), torch.float32), 40)


def test_autocast_rounds_the_products_only() -> None:
    inputs = cast(head_inputs(length=20), torch.float32)
    exact = cast(inputs, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(loss_of(inputs), *inputs[:2])
    truth = with_gradients(expected_loss(*exact, 40), *exact[:2])
    for name, value in truth.items():
        assert relative_error(found[name], value) < 2e-2, name
        assert found[name].dtype == torch.float32


def test_without_gradients_the_loss_is_the_same() -> None:
    inputs = cast(head_inputs(length=9), torch.float32)
    with torch.no_grad():
        evaluated = loss_of(inputs)
    assert torch.equal(evaluated, loss_of(inputs))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_needs_no_gradient(frozen: int) -> None:
    inputs = cast(head_inputs(length=9), torch.float32)
    (both,) = torch.autograd.grad(loss_of(inputs), inputs[1 - frozen])
    inputs[frozen].requires_grad_(False)
    assert torch.equal(torch.autograd.grad(loss_of(inputs), inputs[1 - frozen])[0], both)


def test_an_ignored_position_gets_exactly_no_gradient_even_if_it_is_nan() -> None:
    hidden, weight, labels = cast(head_inputs(length=9), torch.float32)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss = loss_of((hidden, weight, labels))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.isfinite(loss)
    assert not gradient[labels == -100].any()
    assert gradient[labels != -100].any(-1).all()


def test_nan_logits_stay_in_their_row_and_out_of_the_padding() -> None:
    hidden, weight, labels = cast(head_inputs(length=9), torch.float32)
    changed = hidden.detach().clone()
    changed[0, 3] = float("nan")
    (expected,) = torch.autograd.grad(loss_of((hidden, weight, labels), 37), hidden)
    found = torch.autograd.grad(
        loss_of((changed.requires_grad_(), weight, labels), 37), [changed, weight]
    )
    others = torch.ones(2, 9, dtype=torch.bool)
    others[0, 3] = False
    assert torch.equal(found[0][others], expected[others])
    assert found[0][~others].isnan().all()
    assert not found[1][37:].any()


@pytest.mark.parametrize("label", [37, -1])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(label: int) -> None:
    hidden, weight, labels = cast(head_inputs(length=9), torch.float32)
    labels[1, 3] = label
    assert loss_of((hidden, weight, labels), 37).isnan()


@pytest.mark.parametrize("largest", [10.0, 300.0, 3000.0])
def test_a_sure_tokens_loss_is_not_lost_beside_its_logit(largest: float) -> None:
    weight = torch.tensor([[largest], [largest - 12]])
    loss = loss_of((torch.ones(1, 1, 1), weight, torch.zeros(1, 1, dtype=torch.int64)))
    assert float(loss) == pytest.approx(6.1442e-6, rel=0.03)


def test_fp64_is_refused_with_a_remedy() -> None:
    with pytest.raises(BackendError, match=r"fp64.*ops_backend: torch"):
        loss_of(head_inputs(length=9))


@pytest.mark.parametrize(("tokens", "chunk"), [(16384, 4096), (100, 128), (5300, 2688)])
def test_chunks_are_even_and_hold_half_a_gibibyte_of_logits_at_most(
    tokens: int, chunk: int
) -> None:
    row_bytes = 2 * 50304
    assert gpu._chunk_tokens(tokens, row_bytes) == chunk
    assert chunk * row_bytes <= 1 << 29
