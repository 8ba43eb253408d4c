"""Selective scan: each backend against the float64 loop, and what packing must never do."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    LENGTHS,
    TOLERANCE,
    Arguments,
    assert_agrees,
    assert_autocast_changes_no_bit,
    assert_checkpointing_changes_no_bit,
    assert_finite_differences,
    assert_halves_chain,
    assert_identical,
    assert_inference_equals_training,
    assert_no_leak,
    assert_packed_equals_alone,
    assert_poisoned_memory_changes_no_bit,
    assert_strides_change_no_bit,
    assert_threads_change_no_bit,
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
from processes import clean_environment
from torch.fx.experimental.proxy_tensor import make_fx

from mamba_dist.ops.selective_scan import selective_scan

PER_POSITION = {"u", "delta", "B", "C", "z"}
# Whole vectors and a broken one, for every width of vector; d_state likewise for groups of n.
CHANNELS, D_STATE = 40, 11
backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


def scan_arguments(
    *,
    batch: int = 2,
    length: int = 64,
    channels: int = 6,
    d_state: int = 4,
    groups: int = 1,
    options: bool = True,
    seq_idx: torch.Tensor | None = None,
) -> Arguments:
    """float64 inputs; `options` adds D, z, bias, softplus and an initial state."""
    required = {
        "u": random_tensor(batch, length, channels, seed=1),
        "delta": random_tensor(batch, length, channels, seed=2),
        # Not -(1..N): a random spread, and a growing mode in the last column.
        "A": -torch.exp(random_tensor(channels, d_state, seed=3)),
        "B": random_tensor(batch, length, groups, d_state, seed=4),
        "C": random_tensor(batch, length, groups, d_state, seed=5),
        "seq_idx": seq_idx,
    }
    required["A"][:, -1] = 0.01
    if not options:
        # Without softplus delta has to be small for the growing mode.
        return required | {"delta": required["delta"].abs() * 0.3}
    return required | {
        "D": random_tensor(channels, seed=6),
        "z": random_tensor(batch, length, channels, seed=7),
        "delta_bias": random_tensor(channels, seed=8) - 2,
        "delta_softplus": True,
        "initial_state": random_tensor(batch, channels, d_state, seed=9),
    }


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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_of_the_native_kernels_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    length, groups = draw(st.integers(1, 140)), draw(st.integers(1, 3))
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)) | {length})
    documents = [stop - start for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)]
    arguments = scan_arguments(
        length=length,
        # Few channels would let the sum of a gradient cancel to nothing.
        channels=groups * draw(st.integers(5, 36)),
        d_state=draw(st.integers(1, 40)),
        groups=groups,
        options=draw(st.booleans()),
        seq_idx=draw(st.sampled_from([None, document_ids(documents, [length])])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    assert_agrees(selective_scan, arguments, dtype, PER_POSITION, backend="cpu")


@pytest.mark.parametrize(("channels", "d_state", "groups"), [(600, 16, 1), (66, 256, 2)])
def test_channels_of_several_tasks_equal_the_reference(
    channels: int, d_state: int, groups: int
) -> None:
    arguments = scan_arguments(
        length=66, channels=channels, d_state=d_state, groups=groups, seq_idx=packed(66)
    )
    assert_agrees(selective_scan, arguments, torch.float32, PER_POSITION, backend="cpu")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "channels", "groups"), [(1, 1100, 1), (3, 300, 3)])
def test_the_number_of_threads_changes_no_bit(
    batch: int, channels: int, groups: int, dtype: torch.dtype
) -> None:
    arguments = scan_arguments(batch=batch, length=65, channels=channels, groups=groups)
    assert_threads_change_no_bit(selective_scan, arguments, dtype, PER_POSITION, backend="cpu")


@pytest.mark.parametrize("options", [False, True])
def test_the_native_kernels_read_nothing_that_nobody_wrote(options: bool) -> None:
    arguments = scan_arguments(
        length=70, channels=CHANNELS, d_state=D_STATE, options=options, seq_idx=packed(70)
    )
    assert_poisoned_memory_changes_no_bit(selective_scan, arguments, backend="cpu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("d_state", [D_STATE, 16])
def test_decoding_step_by_step_equals_the_reference(
    d_state: int, options: bool, dtype: torch.dtype
) -> None:
    arguments = scan_arguments(length=9, channels=CHANNELS, d_state=d_state, options=options)
    inputs = leaves(arguments, dtype, PER_POSITION)
    per_position = {name for name in PER_POSITION if name in inputs}
    state, outputs = inputs.get("initial_state"), []
    with torch.no_grad():
        for t in range(9):
            step = inputs | {name: inputs[name][:, t : t + 1] for name in per_position}
            step["initial_state"] = state
            y, state = selective_scan(**step, return_final_state=True, backend="cpu")
            outputs.append(y)
        exact = leaves(inputs, torch.float64, set())
        truth, final = selective_scan(**exact, return_final_state=True, backend="reference")
    assert relative_error(torch.cat(outputs, dim=1), truth) <= TOLERANCE[dtype]
    assert relative_error(state, final) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("u", "delta"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_mixed_precisions_are_computed_in_the_widest(u: str, delta: str) -> None:
    inputs = leaves(scan_arguments(length=70, channels=CHANNELS), torch.float32, set())
    for name, dtype in {"u": u, "delta": delta}.items():
        inputs[name] = inputs[name].detach().to(getattr(torch, dtype)).requires_grad_()
    exact = leaves(inputs, torch.float64, set())
    found = run(selective_scan, inputs, backend="cpu")
    truth = run(selective_scan, exact, backend="reference")
    for name in ("final_state", "d A", "d B"):
        assert relative_error(found[name], truth[name]) < TOLERANCE[torch.float32], name
    assert [found[name].dtype for name in ("y", "d u", "d delta")] == [
        inputs[name].dtype for name in ("u", "u", "delta")
    ]


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


@pytest.mark.parametrize("rate", [-math.inf, -1e30, -3000.0, 0.0, 100.0, math.nan])
def test_extreme_rates_give_what_the_reference_gives(rate: float) -> None:
    arguments = scan_arguments(length=5, channels=CHANNELS)
    arguments["A"][:, 1] = rate
    found, truth = (
        selective_scan(**leaves(arguments, dtype, set()), return_final_state=True, backend=backend)
        for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"))
    )
    for native, exact in zip(found, truth, strict=True):
        assert torch.equal(native.isfinite(), exact.isfinite())
        finite = exact.isfinite()
        assert relative_error(native[finite], exact[finite]) < 2e-5


def test_turned_memory_gives_the_same_bits() -> None:
    inputs = leaves(scan_arguments(length=70, channels=CHANNELS), torch.float32, set())
    turned = {
        name: inputs[name].detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()
        for name in PER_POSITION
    }
    assert_identical(
        run(selective_scan, inputs | turned, backend="cpu"),
        run(selective_scan, inputs, backend="cpu"),
    )


@pytest.mark.parametrize("options", [False, True])
def test_the_operators_keep_the_dispatchers_rules(options: bool) -> None:
    arguments = scan_arguments(length=9, options=options, seq_idx=packed(9) if options else None)
    inputs = leaves(arguments, torch.float32, set())
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "seq_idx")
    tensors = [inputs.get(name) for name in names]
    operators = torch.ops.mamba_dist
    torch.library.opcheck(operators.selective_scan_forward.default, (*tensors, options, True))
    *detached, _, seq_idx = [None if tensor is None else tensor.detach() for tensor in tensors]
    initial = tensors[-2] if tensors[-2] is None else tensors[-2].detach()
    y, state, chunk_states = operators.selective_scan_forward(
        *detached, initial, seq_idx, options, True
    )
    gradients = (torch.ones_like(y), torch.ones_like(state) if options else None)
    given = (*gradients, chunk_states, *detached, seq_idx, options, options)
    torch.library.opcheck(operators.selective_scan_backward.default, given)


@pytest.mark.parametrize("length", [1, 70])
def test_compiling_changes_no_bit_and_breaks_no_graph(length: int) -> None:
    def native(**inputs: object) -> object:
        return selective_scan(**inputs, backend="cpu")

    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    inputs = leaves(scan_arguments(length=length, seq_idx=packed(length)), torch.float32, set())
    assert_identical(run(compiled, inputs), run(native, inputs))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), native(**inputs))


def test_a_traced_decoding_step_holds_the_operator() -> None:
    inputs = leaves(scan_arguments(length=1), torch.float32, set())

    def decode(u: torch.Tensor) -> torch.Tensor:
        return selective_scan(**inputs | {"u": u}, backend="cpu")

    with torch.no_grad():
        traced = make_fx(decode)(inputs["u"])
        assert torch.equal(traced(2 * inputs["u"]), decode(2 * inputs["u"]))


@pytest.mark.parametrize("instruction_set", ["avx2", "default"])
def test_narrower_vectors_give_the_same_results(instruction_set: str) -> None:
    code = """
from test_selective_scan import *
for dtype in TOLERANCE:
    for length, d_state in ((1, D_STATE), (200, D_STATE), (130, 16)):
        ids = packed(length)
        for options in (False, True):
            arguments = scan_arguments(
                length=length, channels=CHANNELS, d_state=d_state, options=options, seq_idx=ids
            )
            assert_agrees(selective_scan, arguments, dtype, PER_POSITION, backend="cpu")
print(torch.backends.cpu.get_cpu_capability())
"""
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean_environment(), "ATEN_CPU_CAPABILITY": instruction_set, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip().lower()) == (0, instruction_set), done.stderr


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
