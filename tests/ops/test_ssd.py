"""SSD scan: the torch backend against the float64 loop, and what packing must never do."""

import pytest
import torch
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
    largest_tensor,
    leaves,
    packed,
    random_tensor,
    relative_error,
    run,
    saved_bytes,
)

from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

PER_POSITION = {"x", "dt", "B", "C", "z"}


def ssd_arguments(
    *,
    batch: int = 2,
    length: int = 64,
    heads: int = 4,
    headdim: int = 3,
    d_state: int = 5,
    groups: int = 1,
    options: bool = True,
    seq_idx: torch.Tensor | None = None,
) -> Arguments:
    """float64 inputs; `options` adds D, z, bias, softplus and an initial state."""
    required = {
        "x": random_tensor(batch, length, heads, headdim, seed=1),
        "dt": random_tensor(batch, length, heads, seed=2),
        "A": -torch.exp(random_tensor(heads, seed=3)),
        "B": random_tensor(batch, length, groups, d_state, seed=4),
        "C": random_tensor(batch, length, groups, d_state, seed=5),
        "seq_idx": seq_idx,
    }
    if not options:
        return required | {"dt": required["dt"].abs()}
    return required | {
        "D": random_tensor(heads, seed=6),
        "z": random_tensor(batch, length, heads, headdim, seed=7),
        "dt_bias": random_tensor(heads, seed=8) - 2,
        "dt_softplus": True,
        "initial_state": random_tensor(batch, heads, headdim, d_state, seed=9),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, groups: int, dtype: torch.dtype
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = ssd_arguments(length=length, groups=groups, options=options, seq_idx=seq_idx)
    assert_agrees(ssd, arguments, dtype, PER_POSITION)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_sequence_equals_the_reference(dtype: torch.dtype) -> None:
    seq_idx = document_ids([1000, 1048], [2048])
    arguments = ssd_arguments(length=2048, headdim=16, d_state=16, seq_idx=seq_idx)
    assert_agrees(ssd, arguments, dtype, PER_POSITION)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_chunk_equals_the_reference_in_fp64(data: st.DataObject) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 90))
    groups, d_state = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    one_row = st.lists(st.integers(0, 3), min_size=length, max_size=length).map(sorted)
    ids = [draw(one_row) for _ in range(batch)]
    arguments = ssd_arguments(
        batch=batch,
        length=length,
        heads=groups * draw(st.integers(1, 3)),
        headdim=draw(st.integers(1, 4)),
        d_state=d_state,
        groups=groups,
        options=draw(st.booleans()),
        seq_idx=draw(st.sampled_from([None, torch.tensor(ids, dtype=torch.int32)])),
    )
    chunk_size = draw(st.sampled_from([1, 7, 64, 256]))
    assert_agrees(ssd, arguments, torch.float64, PER_POSITION, chunk_size=chunk_size)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [1, 7, 66])
def test_gradients_equal_finite_differences(backend: str, length: int) -> None:
    seq_idx = None if length == 1 else document_ids([2, length - 2])
    arguments = ssd_arguments(
        batch=1, length=length, heads=2, headdim=2, d_state=2, seq_idx=seq_idx
    )
    options = {"chunk_size": 3, "backend": backend}
    assert_finite_differences(ssd, arguments, fast=length > 7, **options)


def test_one_state_per_head_is_the_selective_scan_with_a_repeated_decay() -> None:
    arguments = ssd_arguments(length=70, heads=4, headdim=3, d_state=5, seq_idx=packed(70))
    y = ssd(**arguments)

    def per_channel(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(3, dim=-1)

    expected = selective_scan(
        arguments["x"].flatten(2),
        per_channel(arguments["dt"]),
        per_channel(arguments["A"])[:, None].expand(12, 5),
        arguments["B"],
        arguments["C"],
        per_channel(arguments["D"]),
        arguments["z"].flatten(2),
        per_channel(arguments["dt_bias"]),
        True,
        arguments["seq_idx"],
        arguments["initial_state"].flatten(1, 2),
        backend="reference",
    )
    assert relative_error(y.flatten(2), expected) < 1e-12


def test_strong_decay_gives_finite_gradients() -> None:
    arguments = ssd_arguments(length=130, options=False)
    arguments["A"] = torch.full((4,), -50.0, dtype=torch.float64)
    arguments["dt"] = arguments["dt"] * 20
    results = run(ssd, leaves(arguments, torch.float32, set()))
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
    assert_agrees(ssd, arguments, torch.float32, PER_POSITION)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("at", [1, 83, 149])
def test_two_halves_chained_by_the_state_equal_the_whole(backend: str, at: int) -> None:
    assert_halves_chain(ssd, ssd_arguments(length=150), PER_POSITION, at=at, backend=backend)


def test_a_packed_row_equals_its_documents_alone() -> None:
    arguments = ssd_arguments(batch=1, length=100)
    assert_packed_equals_alone(ssd, arguments, PER_POSITION, [33, 1, 66])


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("row", "start", "stop"), [(0, 0, 30), (0, 30, 64), (0, 64, 130), (1, 0, 130)]
)
def test_no_bit_leaks_between_documents(
    row: int, start: int, stop: int, value: float | None
) -> None:
    arguments = ssd_arguments(batch=2, length=130, seq_idx=document_ids([30, 34, 66], [130]))
    document = slice(start, stop)
    assert_no_leak(ssd, arguments, PER_POSITION, row=row, document=document, value=value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    arguments = ssd_arguments(length=70, seq_idx=packed(70))
    assert_checkpointing_changes_no_bit(ssd, arguments, reentrant=reentrant)


def test_autocast_changes_no_bit() -> None:
    assert_autocast_changes_no_bit(ssd, ssd_arguments(length=70))


def test_two_runs_are_bit_identical() -> None:
    arguments = ssd_arguments(length=130, headdim=64, d_state=64)
    assert_two_runs_are_identical(ssd, arguments)


def test_strided_inputs_give_the_same_bits() -> None:
    assert_strides_change_no_bit(ssd, ssd_arguments(length=70), PER_POSITION)


def test_without_gradients_the_output_is_the_same() -> None:
    assert_inference_equals_training(ssd, ssd_arguments(length=70))


def test_one_output_without_a_gradient_is_fine() -> None:
    inputs = leaves(ssd_arguments(length=20), torch.float64, set())
    for pick in (0, 1):
        found, truth = (
            torch.autograd.grad(
                ssd(**inputs, return_final_state=True, backend=backend)[pick].sum(),
                [inputs["dt"], inputs["initial_state"]],
            )
            for backend in ("torch", "reference")
        )
        assert all(relative_error(f, t) < 1e-12 for f, t in zip(found, truth, strict=True))


def test_neither_states_nor_mixing_matrices_of_all_chunks_exist() -> None:
    batch, length, heads, headdim, d_state = 2, 1024, 4, 16, 16
    arguments = leaves(
        ssd_arguments(batch=batch, length=length, heads=heads, headdim=headdim, d_state=d_state),
        torch.float32,
        set(),
    )
    history = batch * length * heads * headdim * d_state
    sizes: list[int] = []
    with saved_bytes(sizes), largest_tensor() as largest:
        run(ssd, arguments)
    inputs = sum(v.numel() * 4 for v in arguments.values() if isinstance(v, torch.Tensor))
    assert sum(sizes[: len(arguments) + length // 64]) - inputs < history * 4 / 15
    assert largest.elements < history / 8


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dt", torch.ones(2, 8, 5), r"dt has shape \(2, 8, 5\), expected \(2, 8, 4\)"),
        ("A", torch.ones(4, 5), r"A has shape \(4, 5\), expected \(4,\)"),
        ("B", torch.ones(2, 8, 3, 5), "4 is not divisible by the 3 groups"),
        ("initial_state", torch.ones(2, 4, 5, 3), r"expected \(2, 4, 3, 5\)"),
        ("chunk_size", 0, "chunk_size is 0"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**ssd_arguments(length=8) | {name: value})
