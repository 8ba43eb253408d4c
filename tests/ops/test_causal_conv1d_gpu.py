"""The GPU's causal convolution, its kernels' sources run on the CPU, against the float64 reference.

Every other set of macros is compiled again, so the tests share few of them.
"""

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import (
    Arguments,
    assert_agrees,
    assert_identical,
    assert_no_leak,
    assert_strides_change_no_bit,
    document_ids,
    leaves,
    packed,
    random_tensor,
    relative_error,
    run,
)
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.causal_conv1d import causal_conv1d, gpu, torch_chunked

PER_POSITION = {"x"}
# Whole vectors of every dtype, and a warp that is not full.
CHANNELS = 40


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "launch", launch_emulated)


def inputs(
    *,
    length: int,
    channels: int = CHANNELS,
    width: int = 4,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
) -> Arguments:
    """float64 inputs with bias and initial state."""
    return {
        "x": random_tensor(2, length, channels, seed=1),
        "weight": random_tensor(channels, width, seed=2),
        "bias": random_tensor(channels, seed=3),
        "initial_state": random_tensor(2, channels, width - 1, seed=4),
        "activation": activation,
        "seq_idx": seq_idx,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 3, 63, 64, 65, 200])
def test_outputs_and_all_gradients_equal_the_reference(length: int, dtype: torch.dtype) -> None:
    arguments = inputs(length=length, seq_idx=packed(length))
    assert_agrees(causal_conv1d, arguments, dtype, PER_POSITION, backend="gpu")


@pytest.mark.parametrize("length", [2, 65])
def test_without_bias_state_and_activation_other_widths_and_odd_channels(length: int) -> None:
    arguments = inputs(length=length, channels=35, width=3, activation=None)
    assert_agrees(causal_conv1d, arguments, torch.float32, PER_POSITION, backend="gpu")
    del arguments["bias"], arguments["initial_state"]
    assert_agrees(causal_conv1d, arguments, torch.float32, PER_POSITION, backend="gpu")


def test_two_taps_and_odd_channels_in_bf16() -> None:
    arguments = inputs(length=70, channels=35, width=2)
    assert_agrees(causal_conv1d, arguments, torch.bfloat16, PER_POSITION, backend="gpu")


def test_a_row_of_many_blocks_equals_the_reference() -> None:
    arguments = inputs(length=523, seq_idx=document_ids([254, 1, 2, 266], [523]))
    assert_agrees(causal_conv1d, arguments, torch.float32, PER_POSITION, backend="gpu")


def test_one_step_of_decoding_equals_the_reference() -> None:
    assert_agrees(causal_conv1d, inputs(length=1), torch.float32, PER_POSITION, backend="gpu")


def test_without_states_the_gradients_are_those_of_zero_states() -> None:
    arguments = inputs(length=70, seq_idx=packed(70))
    given = leaves(arguments, torch.float32, set())
    given["initial_state"] = torch.zeros_like(given["initial_state"])
    without = given | {"initial_state": None}
    results = []
    for options in (given, without):
        y = causal_conv1d(**options, backend="gpu")
        gradients = torch.autograd.grad(y.square().sum(), [given[n] for n in ("x", "weight")])
        results.append(dict(zip(("x", "weight"), gradients, strict=True)))
    assert_identical(*results)
    exact = leaves(given, torch.float64, set())
    truth = causal_conv1d(**exact, backend="reference").square().sum()
    (expected,) = torch.autograd.grad(truth, exact["weight"])
    assert relative_error(results[1]["weight"], expected) <= tolerance(torch.float32)


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (5, 6), (6, 40)])
def test_no_bit_leaks_between_documents(start: int, stop: int, value: float | None) -> None:
    arguments = inputs(length=40, seq_idx=document_ids([5, 1, 34], [40]))
    document = slice(start, stop)
    assert_no_leak(
        causal_conv1d, arguments, PER_POSITION, row=0, document=document, value=value, backend="gpu"
    )


def test_views_of_wider_rows_give_the_same_bits() -> None:
    arguments = inputs(length=70, seq_idx=packed(70))
    assert_strides_change_no_bit(causal_conv1d, arguments, PER_POSITION, backend="gpu")


def test_rows_that_no_vector_divides_are_read_in_place() -> None:
    arguments = leaves(inputs(length=65, width=3, activation=None), torch.float32, set())
    wide = torch.zeros(2, 65, CHANNELS + 4)
    view = wide[..., 1 : 1 + CHANNELS].copy_(arguments["x"].detach())
    assert gpu._prepared(gpu._Inputs(view, arguments["weight"], None, None, None)).x is view
    y = causal_conv1d(**arguments | {"x": view}, backend="gpu")
    truth = causal_conv1d(**leaves(arguments, torch.float64, set()), backend="reference")
    assert relative_error(y, truth) <= tolerance(torch.float32)


def test_vectors_are_as_wide_as_every_row_allows() -> None:
    wide = torch.empty(2, 9, 64, dtype=torch.bfloat16)
    assert gpu._vector((wide[..., :48], wide[..., 8:56]), 16) == 8
    assert gpu._vector((wide[..., :48], wide[..., 4:52]), 16) == 4
    assert gpu._vector((wide[..., :48], wide[..., 1:49]), 16) == 1
    assert gpu._vector((wide[..., :42],), 16) == 2
    assert gpu._vector((torch.empty(2, 9, 50)[..., :40],), 16) == 2
    assert gpu._vector((torch.empty(2, 9, 64),), 16) == 4


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(like: Tensor, *shape: int | torch.Size) -> Tensor:
        return torch.empty(*shape, dtype=like.dtype).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    arguments = inputs(length=70, seq_idx=packed(70))
    assert_agrees(causal_conv1d, arguments, torch.float32, PER_POSITION, backend="gpu")


def test_ids_of_64_bits_are_compared_whole() -> None:
    arguments = leaves(inputs(length=70, seq_idx=packed(70)), torch.float32, set())
    wide = arguments | {"seq_idx": arguments["seq_idx"].long() << 32}
    assert_identical(
        run(causal_conv1d, wide, backend="gpu"), run(causal_conv1d, arguments, backend="gpu")
    )


def test_half_precision_is_computed_in_fp32() -> None:
    arguments = inputs(length=70, seq_idx=packed(70))
    arguments["x"] = arguments["x"].half()
    y, state = causal_conv1d(**arguments, return_final_state=True, backend="gpu")
    exact = arguments | {"x": arguments["x"].double()}
    truth = causal_conv1d(**exact, backend="reference")
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)
    assert relative_error(y, truth) < 2**-11


def test_a_second_derivative_is_refused() -> None:
    arguments = leaves(inputs(length=9, seq_idx=packed(9)), torch.float32, set())
    y, state = causal_conv1d(**arguments, return_final_state=True, backend="gpu")
    loss = y.square().sum() + state.sum()
    (first,) = torch.autograd.grad(loss, arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"CausalConv1d has no derivative of its own"):
        first.sum().backward()


def test_other_widths_go_to_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch_chunked, "causal_conv1d", lambda *given: calls.append(given) or given)
    x = torch.zeros(1, 2, 3)
    for width in (1, 5):
        gpu.causal_conv1d(x, torch.zeros(3, width), None, None, None, False, True)
    assert [given[1].shape[1] for given in calls] == [1, 5]


def test_fp64_is_refused_with_a_remedy() -> None:
    with pytest.raises(BackendError, match=r"fp64.*ops_backend: torch"):
        causal_conv1d(**inputs(length=2), backend="gpu")
