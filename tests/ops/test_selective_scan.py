"""Selective scan: each backend against the float64 loop, and what packing must never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    LENGTHS,
    TOLERANCE,
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
    largest_tensor,
    leaves,
    packed,
    relative_error,
    run,
    saved_bytes,
)
from scan_cases import CHANNELS, PER_POSITION, scan_arguments

from mamba_dist.ops.selective_scan import selective_scan

backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, groups: int, dtype: torch.dtype, backend: str
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = scan_arguments(length=length, groups=groups, options=options, seq_idx=seq_idx)
    assert_agrees(selective_scan, arguments, dtype, PER_POSITION, backend=backend)


@pytest.mark.parametrize("length", [16, 17, 33])
def test_rows_handled_in_turns_equal_the_reference(length: int) -> None:
    seq_idx = document_ids([length], [length - 1, 1], [16, length - 16] if length > 16 else [16])
    arguments = scan_arguments(batch=3, length=length, channels=1024, d_state=16, seq_idx=seq_idx)
    assert_agrees(selective_scan, arguments, torch.float32, PER_POSITION)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cpu", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("torch", torch.float32, marks=pytest.mark.slow),
        pytest.param("torch", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_long_sequence_equals_the_reference(backend: str, dtype: torch.dtype) -> None:
    seq_idx = document_ids([1000, 1048], [2048])
    arguments = scan_arguments(length=2048, channels=64, d_state=16, seq_idx=seq_idx)
    assert_agrees(selective_scan, arguments, dtype, PER_POSITION, backend=backend)


@backends
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_equals_the_reference_in_fp64(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 90))
    groups, d_state = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ids = [
        sorted(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
        for _ in range(batch)
    ]
    arguments = scan_arguments(
        batch=batch,
        length=length,
        channels=groups * draw(st.integers(1, 3)),
        d_state=d_state,
        groups=groups,
        options=draw(st.booleans()),
        seq_idx=draw(st.sampled_from([None, torch.tensor(ids, dtype=torch.int32)])),
    )
    assert_agrees(selective_scan, arguments, torch.float64, PER_POSITION, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("length", [1, 5, 66])
def test_gradients_equal_finite_differences(backend: str, length: int) -> None:
    seq_idx = None if length == 1 else document_ids([2, length - 2])
    arguments = scan_arguments(batch=1, length=length, channels=2, d_state=2, seq_idx=seq_idx)
    assert_finite_differences(selective_scan, arguments, fast=length > 5, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("at", [1, 83, 149])
def test_two_halves_chained_by_the_state_equal_the_whole(backend: str, at: int) -> None:
    arguments = scan_arguments(length=150)
    assert_halves_chain(selective_scan, arguments, PER_POSITION, at=at, backend=backend)


@backends
def test_a_packed_row_equals_its_documents_alone(backend: str) -> None:
    arguments = scan_arguments(batch=1, length=100)
    lengths = [33, 1, 66]
    assert_packed_equals_alone(selective_scan, arguments, PER_POSITION, lengths, backend=backend)


@backends
@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("row", "start", "stop"), [(0, 0, 30), (0, 30, 64), (0, 64, 130), (1, 0, 130)]
)
def test_no_bit_leaks_between_documents(
    row: int, start: int, stop: int, value: float | None, backend: str
) -> None:
    seq_idx = document_ids([30, 34, 66], [130])
    arguments = scan_arguments(length=130, channels=10, d_state=5, seq_idx=seq_idx)
    assert_no_leak(
        selective_scan,
        arguments,
        PER_POSITION,
        row=row,
        document=slice(start, stop),
        value=value,
        backend=backend,
    )


@backends
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, backend: str) -> None:
    arguments = scan_arguments(length=70, seq_idx=packed(70))
    assert_checkpointing_changes_no_bit(
        selective_scan, arguments, reentrant=reentrant, backend=backend
    )


@backends
def test_autocast_changes_no_bit(backend: str) -> None:
    assert_autocast_changes_no_bit(selective_scan, scan_arguments(length=70), backend=backend)


@backends
def test_two_runs_are_bit_identical(backend: str) -> None:
    arguments = scan_arguments(batch=3, length=65, channels=512, d_state=16)
    assert_two_runs_are_identical(selective_scan, arguments, backend=backend)


@backends
def test_strided_inputs_give_the_same_bits(backend: str) -> None:
    arguments = scan_arguments(length=70, channels=CHANNELS)
    assert_strides_change_no_bit(selective_scan, arguments, PER_POSITION, backend=backend)


@backends
def test_without_gradients_the_output_is_the_same(backend: str) -> None:
    assert_inference_equals_training(selective_scan, scan_arguments(length=70), backend=backend)


@backends
def test_half_precision_is_computed_in_fp32(backend: str) -> None:
    arguments = scan_arguments(length=20, channels=CHANNELS)
    arguments |= {name: arguments[name].half() for name in PER_POSITION}
    y, state = selective_scan(**arguments, return_final_state=True, backend=backend)
    exact = arguments | {name: arguments[name].double() for name in PER_POSITION}
    truth, final = selective_scan(**exact, return_final_state=True, backend="reference")
    assert y.dtype == torch.float16
    assert relative_error(y, truth) < 2**-11
    assert relative_error(state, final) < TOLERANCE[torch.float32]


@backends
def test_ids_of_64_bits_are_compared_whole(backend: str) -> None:
    arguments = scan_arguments(length=6, seq_idx=document_ids([2, 4], [6]))
    y = selective_scan(**arguments, backend=backend)
    arguments["seq_idx"] = arguments["seq_idx"].long() << 32
    assert torch.equal(selective_scan(**arguments, backend=backend), y)


@backends
def test_one_output_without_a_gradient_is_fine(backend: str) -> None:
    inputs = leaves(scan_arguments(length=20), torch.float64, set())
    for pick in (0, 1):
        found, truth = (
            torch.autograd.grad(
                selective_scan(**inputs, return_final_state=True, backend=name)[pick].sum(),
                [inputs["delta"], inputs["initial_state"]],
            )
            for name in (backend, "reference")
        )
        assert all(relative_error(f, t) < 1e-12 for f, t in zip(found, truth, strict=True))


@backends
def test_the_full_state_history_never_exists(backend: str) -> None:
    batch, length, channels, d_state = 2, 1024, 128, 16
    arguments = leaves(
        scan_arguments(batch=batch, length=length, channels=channels, d_state=d_state),
        torch.float32,
        set(),
    )
    history = batch * length * channels * d_state
    sizes: list[int] = []
    with saved_bytes(sizes), largest_tensor() as largest:
        run(selective_scan, arguments, backend=backend)
    inputs = sum(v.numel() * 4 for v in arguments.values() if isinstance(v, torch.Tensor))
    saved_limit = history * 4 / (64 if backend == "cpu" else 15)
    assert sum(sizes) - inputs <= saved_limit
    assert largest.elements < history / 8


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("delta", torch.ones(2, 8, 5), r"delta has shape \(2, 8, 5\), expected \(2, 8, 6\)"),
        ("C", torch.ones(2, 8, 2, 4), r"C has shape .* expected \(2, 8, 1, 4\)"),
        ("B", torch.ones(2, 8, 4, 4), "6 is not divisible by the 4 groups"),
        ("initial_state", torch.ones(2, 4, 6), r"expected \(2, 6, 4\)"),
        ("seq_idx", torch.zeros(2, 8), "seq_idx is torch.float32, expected torch.int32"),
        ("u", torch.ones(2, 8, 6, dtype=torch.int64), "u is torch.int64, expected a floating"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**scan_arguments(length=8) | {name: value})
