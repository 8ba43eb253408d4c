"""Causal convolution: the torch backend against the float64 loop, and no leak in packed rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    LENGTHS,
    Arguments,
    assert_agrees,
    assert_autocast_changes_no_bit,
    assert_checkpointing_changes_no_bit,
    assert_finite_differences,
    assert_halves_chain,
    assert_inference_equals_training,
    assert_no_leak,
    assert_packed_equals_alone,
    assert_strides_change_no_bit,
    assert_two_runs_are_identical,
    document_ids,
    packed,
    random_tensor,
    relative_error,
)

from mamba_dist.ops.causal_conv1d import causal_conv1d

PER_POSITION = {"x"}


def conv_arguments(
    *,
    batch: int = 2,
    length: int = 64,
    channels: int = 6,
    width: int = 4,
    options: bool = True,
    seq_idx: torch.Tensor | None = None,
) -> Arguments:
    """float64 inputs; `options` adds bias, SiLU and an initial state."""
    required = {
        "x": random_tensor(batch, length, channels, seed=1),
        "weight": random_tensor(channels, width, seed=2),
        "seq_idx": seq_idx,
    }
    if not options:
        return required
    return required | {
        "bias": random_tensor(channels, seed=3),
        "activation": "silu",
        "initial_state": random_tensor(batch, channels, width - 1, seed=4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [*LENGTHS, 2, 3, 4])
def test_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, dtype: torch.dtype
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = conv_arguments(length=length, options=options, seq_idx=seq_idx)
    assert_agrees(causal_conv1d, arguments, dtype, PER_POSITION)


@pytest.mark.parametrize("channels", [3000, 70000])
def test_tiles_of_few_steps_equal_the_reference(channels: int) -> None:
    arguments = conv_arguments(length=50, channels=channels, seq_idx=document_ids([48, 2], [50]))
    if channels > 10000:
        # One step per tile: taps reach over several tiles back.
        arguments = conv_arguments(length=7, channels=channels)
    assert_agrees(causal_conv1d, arguments, torch.float32, PER_POSITION)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_equals_the_reference_in_fp64(data: st.DataObject) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    one_row = st.lists(st.integers(0, 5), min_size=length, max_size=length).map(sorted)
    ids = [draw(one_row) for _ in range(batch)]
    arguments = conv_arguments(
        batch=batch,
        length=length,
        channels=draw(st.integers(1, 5)),
        width=draw(st.integers(1, 6)),
        options=draw(st.booleans()),
        seq_idx=draw(st.sampled_from([None, torch.tensor(ids, dtype=torch.int32)])),
    )
    assert_agrees(causal_conv1d, arguments, torch.float64, PER_POSITION)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_gradients_equal_finite_differences(backend: str, length: int) -> None:
    seq_idx = None if length == 1 else document_ids([1, length - 1])
    arguments = conv_arguments(batch=1, length=length, channels=2, seq_idx=seq_idx)
    assert_finite_differences(causal_conv1d, arguments, fast=False, backend=backend)


def test_without_documents_it_is_the_padded_convolution_of_pytorch() -> None:
    arguments = conv_arguments(length=30)
    arguments["initial_state"] = None
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    padded = F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., :30]
    assert relative_error(causal_conv1d(**arguments), F.silu(padded).mT) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("at", [1, 2, 17])
def test_two_halves_chained_by_the_state_equal_the_whole(backend: str, at: int) -> None:
    arguments = conv_arguments(length=30)
    assert_halves_chain(causal_conv1d, arguments, PER_POSITION, at=at, backend=backend)


def test_a_packed_row_equals_its_documents_alone() -> None:
    arguments = conv_arguments(batch=1, length=40)
    assert_packed_equals_alone(causal_conv1d, arguments, PER_POSITION, [5, 1, 2, 30, 2])


def test_the_final_state_is_the_last_inputs_of_the_last_document() -> None:
    arguments = conv_arguments(length=8, seq_idx=document_ids([6, 2], [8]))
    _, state = causal_conv1d(**arguments, return_final_state=True)
    assert torch.equal(state[0, :, 0], torch.zeros(6))
    assert torch.equal(state[0, :, 1:], arguments["x"][0, 6:].T)
    assert torch.equal(state[1], arguments["x"][1, 5:].T)


def test_the_final_state_tells_documents_apart_that_share_an_id() -> None:
    arguments = conv_arguments(length=8, seq_idx=document_ids([6, 1, 1], [8]))
    _, state = causal_conv1d(**arguments, return_final_state=True)
    assert arguments["seq_idx"][0, -1] == arguments["seq_idx"][0, 5]
    assert torch.equal(state[0, :, :2], torch.zeros(6, 2))
    assert torch.equal(state[0, :, 2], arguments["x"][0, 7])


def test_a_short_sequence_keeps_the_end_of_the_initial_state() -> None:
    arguments = conv_arguments(length=2)
    _, state = causal_conv1d(**arguments, return_final_state=True)
    assert torch.equal(state[..., 0], arguments["initial_state"][..., -1])
    assert torch.equal(state[..., 1:], arguments["x"].mT)


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize(("row", "start", "stop"), [(0, 0, 5), (0, 5, 6), (0, 6, 40), (1, 0, 40)])
def test_no_bit_leaks_between_documents(
    row: int, start: int, stop: int, value: float | None
) -> None:
    arguments = conv_arguments(length=40, seq_idx=document_ids([5, 1, 34], [40]))
    document = slice(start, stop)
    assert_no_leak(causal_conv1d, arguments, PER_POSITION, row=row, document=document, value=value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    arguments = conv_arguments(length=70, seq_idx=packed(70))
    assert_checkpointing_changes_no_bit(causal_conv1d, arguments, reentrant=reentrant)


def test_autocast_changes_no_bit() -> None:
    assert_autocast_changes_no_bit(causal_conv1d, conv_arguments(length=70))


def test_two_runs_are_bit_identical() -> None:
    assert_two_runs_are_identical(causal_conv1d, conv_arguments(length=300, channels=512))


def test_strided_inputs_give_the_same_bits() -> None:
    assert_strides_change_no_bit(causal_conv1d, conv_arguments(length=70), PER_POSITION)


def test_without_gradients_the_output_is_the_same() -> None:
    assert_inference_equals_training(causal_conv1d, conv_arguments(length=70))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.ones(5, 4), r"weight has shape \(5, 4\), expected \(6, 4\)"),
        ("initial_state", torch.ones(2, 3, 6), r"expected \(2, 6, 3\)"),
        ("seq_idx", torch.zeros(2, 7, dtype=torch.int32), r"expected \(2, 8\)"),
        ("activation", "relu", "activation is 'relu', expected None or 'silu'"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**conv_arguments(length=8) | {name: value})
