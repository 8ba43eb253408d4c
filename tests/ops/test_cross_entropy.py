"""Chunked cross entropy of the head against PyTorch's own, and what it must not allocate or mix."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import TOLERANCE, largest_tensor, random_tensor, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.cross_entropy.cpu import softmax_loss
from mamba_dist.ops.linear import cpu as linear_cpu

Inputs = tuple[Tensor, Tensor, Tensor]
for_each_backend = pytest.mark.parametrize("backend", ["torch", "cpu"])


def head_inputs(
    *, batch: int = 2, length: int = 150, width: int = 8, rows: int = 40, vocab_size: int = 37
) -> Inputs:
    """hidden (B, L, D), weight (V, D) in float64, labels with some -100."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocab_size, (batch, length), generator=generator)
    labels[:, ::7] = -100
    hidden = random_tensor(batch, length, width, seed=1)
    return hidden, 0.25 * random_tensor(rows, width, seed=2), labels


def expected_loss(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(hidden, weight[:vocab_size])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def with_gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    # An engine scales the sum by the count of labels before it goes back.
    grad_hidden, grad_weight = torch.autograd.grad(loss / 256, [hidden, weight])
    return {"loss": loss.detach(), "hidden": grad_hidden, "weight": grad_weight}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    hidden, weight, labels = inputs
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
    return leaves[0], leaves[1], labels


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("vocab_size", [37, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_equal_pytorch(
    backend: str, vocab_size: int, dtype: torch.dtype
) -> None:
    inputs = cast(head_inputs(), dtype)
    exact = cast(inputs, torch.float64)
    loss = linear_cross_entropy(*inputs, vocab_size=vocab_size, backend=backend)
    found = with_gradients(loss, *inputs[:2])
    truth = with_gradients(expected_loss(*exact, vocab_size), *exact[:2])
    for name, value in truth.items():
        assert relative_error(found[name], value) < TOLERANCE[dtype], name
        assert found[name].dtype == dtype
    assert not found["weight"][vocab_size:].any()


@for_each_backend
def test_several_chunks_of_tokens_equal_pytorch(backend: str) -> None:
    # fp64: in fp32 a sum over 9000 rows of a plain matmul is off by more than the tolerance.
    inputs = cast(head_inputs(rows=9000, vocab_size=9000), torch.float64)
    with largest_tensor() as largest:
        found = with_gradients(linear_cross_entropy(*inputs, backend=backend), *inputs[:2])
    assert largest.elements < 300 * 9000
    truth = with_gradients(expected_loss(*inputs, 9000), *inputs[:2])
    assert all(relative_error(found[name], value) < 1e-12 for name, value in truth.items())


@for_each_backend
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    width=st.integers(1, 9),
    vocab_size=st.integers(1, 30),
    padding=st.integers(0, 5),
)
def test_any_shape_equals_pytorch(
    batch: int, length: int, width: int, vocab_size: int, padding: int, backend: str
) -> None:
    rows = vocab_size + padding
    inputs = cast(
        head_inputs(batch=batch, length=length, width=width, rows=rows, vocab_size=vocab_size),
        torch.float64,
    )
    loss = linear_cross_entropy(*inputs, vocab_size=vocab_size, backend=backend)
    truth = with_gradients(expected_loss(*inputs, vocab_size), *inputs[:2])
    for name, value in with_gradients(loss, *inputs[:2]).items():
        torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12)


@for_each_backend
def test_gradients_equal_finite_differences(backend: str) -> None:
    hidden, weight, labels = cast(head_inputs(length=9, rows=6, vocab_size=5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, vocab_size=5, backend=backend),
        (hidden, weight),
    )


@pytest.mark.parametrize("emulated", [False, True], ids=["bf16 as found", "bf16 emulated"])
@for_each_backend
def test_autocast_rounds_the_matmuls_only(
    backend: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if emulated:
        monkeypatch.setattr(linear_cpu, "_HAS_BF16", False)
    inputs = cast(head_inputs(), torch.float32)
    exact = cast(inputs, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*inputs, backend=backend)
        found = with_gradients(loss, *inputs[:2])
    assert loss.dtype == torch.float32
    truth = with_gradients(expected_loss(*exact, 40), *exact[:2])
    for name, value in truth.items():
        # Looser than an output's rounding: a logit's rounding error is exponentiated.
        assert relative_error(found[name], value) < 2e-2, name
        assert found[name].dtype == torch.float32
    # It did use bf16, or what is better where bf16 is emulated.
    in_fp32 = backend == "cpu" and linear_cpu.product_dtype(torch.bfloat16) == torch.float32
    assert (relative_error(found["hidden"], truth["hidden"]) < 1e-5) == in_fp32


@for_each_backend
def test_bf16_inputs_get_an_fp32_loss_and_bf16_gradients(backend: str) -> None:
    inputs = cast(head_inputs(), torch.bfloat16)
    loss = linear_cross_entropy(*inputs, backend=backend)
    found = with_gradients(loss, *inputs[:2])
    assert loss.dtype == torch.float32
    assert found["hidden"].dtype == found["weight"].dtype == torch.bfloat16
    exact = cast(inputs, torch.float64)
    truth = with_gradients(expected_loss(*exact, 40), *exact[:2])
    assert all(relative_error(found[n], value) < 2e-2 for n, value in truth.items())


@for_each_backend
@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
def test_no_bit_leaks_between_positions(value: float, backend: str) -> None:
    inputs = cast(head_inputs(), torch.float32)
    changed = cast(inputs, torch.float32)
    with torch.no_grad():
        changed[0][0, 40:90] = value
    grad, grad_changed = (
        torch.autograd.grad(linear_cross_entropy(*given_inputs, backend=backend), given_inputs[0])[
            0
        ]
        for given_inputs in (inputs, changed)
    )
    others = torch.ones(2, 150, dtype=torch.bool)
    others[0, 40:90] = False
    assert torch.equal(grad[others], grad_changed[others])
    assert not torch.equal(grad[~others], grad_changed[~others])


@for_each_backend
def test_an_ignored_position_gets_exactly_no_gradient_even_if_it_is_nan(backend: str) -> None:
    hidden, weight, labels = cast(head_inputs(), torch.float32)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.isfinite(loss)
    assert not gradient[labels == -100].any()
    assert gradient[labels != -100].any(-1).all()


@for_each_backend
def test_no_labels_at_all_is_a_zero_loss_with_zero_gradients(backend: str) -> None:
    hidden, weight, labels = cast(head_inputs(), torch.float32)
    found = with_gradients(
        linear_cross_entropy(hidden, weight, labels * 0 - 100, backend=backend), hidden, weight
    )
    assert not any(value.any() for value in found.values())


@for_each_backend
def test_large_logits_do_not_overflow(backend: str) -> None:
    hidden, weight, labels = cast(head_inputs(), torch.float32)
    found = with_gradients(
        linear_cross_entropy(hidden * 1e4, weight, labels, backend=backend), hidden, weight
    )
    assert all(torch.isfinite(value).all() for value in found.values())


@for_each_backend
def test_the_backward_can_run_twice(backend: str) -> None:
    hidden, weight, labels = cast(head_inputs(), torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels, backend=backend)
    first = torch.autograd.grad(loss * 2, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss * 2, hidden)[0], first)


@for_each_backend
def test_without_gradients_the_loss_is_the_same(backend: str) -> None:
    inputs = cast(head_inputs(), torch.float32)
    with torch.no_grad():
        evaluated = linear_cross_entropy(*inputs, backend=backend)
    assert torch.equal(evaluated, linear_cross_entropy(*inputs, backend=backend))


@for_each_backend
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_needs_no_gradient(frozen: int, backend: str) -> None:
    inputs = cast(head_inputs(), torch.float32)
    both = torch.autograd.grad(linear_cross_entropy(*inputs, backend=backend), inputs[1 - frozen])[
        0
    ]
    inputs[frozen].requires_grad_(False)
    assert torch.equal(
        torch.autograd.grad(linear_cross_entropy(*inputs, backend=backend), inputs[1 - frozen])[0],
        both,
    )


@for_each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, backend: str) -> None:
    plain, inputs = cast(head_inputs(), torch.float32), cast(head_inputs(), torch.float32)
    linear_cross_entropy(*plain, backend=backend).backward()
    checkpoint(
        partial(linear_cross_entropy, backend=backend), *inputs, use_reentrant=reentrant
    ).backward()
    for found, expected in zip(inputs[:2], plain[:2], strict=True):
        assert found.grad is not None
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(40, 7)}, r"weight has shape \(40, 7\), expected \(40, 8\)"),
        ({"labels": torch.zeros(2, 149, dtype=torch.int64)}, r"expected \(2, 150\)"),
        ({"labels": torch.zeros(2, 150, dtype=torch.int32)}, "labels are torch.int32"),
        ({"vocab_size": 41}, "vocab_size is 41, expected 1 to 40"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    hidden, weight, labels = head_inputs()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels} | change)


def test_more_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits = random_tensor(50, 37, seed=1).float()
            losses = softmax_loss(logits, torch.arange(50) % 37, True)
            results.append((losses, logits))
    finally:
        torch.set_num_threads(before)
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_operator_is_a_proper_torch_operator(dtype: torch.dtype) -> None:
    logits = random_tensor(5, 19, seed=1).to(dtype)
    torch.library.opcheck(softmax_loss, (logits, torch.arange(5), True))


@for_each_backend
@pytest.mark.parametrize("label", [37, -1])
def test_a_label_outside_the_vocabulary_is_an_error(label: int, backend: str) -> None:
    hidden, weight, labels = cast(head_inputs(), torch.float32)
    labels[1, 3] = label
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, labels, vocab_size=37, backend=backend)


@for_each_backend
@pytest.mark.parametrize("largest", [10.0, 300.0, 3000.0])
def test_a_sure_tokens_loss_is_not_lost_beside_its_logit(largest: float, backend: str) -> None:
    weight = torch.tensor([[largest], [largest - 12]])
    loss = linear_cross_entropy(
        torch.ones(1, 1, 1), weight, torch.zeros(1, 1, dtype=torch.int64), backend=backend
    )
    assert float(loss) == pytest.approx(6.1442e-6, rel=0.03)
