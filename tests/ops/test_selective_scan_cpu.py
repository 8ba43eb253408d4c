"""Selective scan: what the native kernels alone can do wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    TOLERANCE,
    assert_a_step_agrees,
    assert_agrees,
    assert_identical,
    assert_poisoned_memory_changes_no_bit,
    assert_threads_change_no_bit,
    document_ids,
    leaves,
    packed,
    relative_error,
    run,
)
from scan_cases import CHANNELS, D_STATE, PER_POSITION, scan_arguments
from torch.fx.experimental.proxy_tensor import make_fx

from mamba_dist.ops.selective_scan import selective_scan


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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_of_a_large_state_is_shared_by_threads(threads: int) -> None:
    # 3 * 3000 * 16 elements of state, above what one thread does alone.
    arguments = scan_arguments(batch=3, length=1, channels=3000, d_state=16)
    assert_a_step_agrees(selective_scan, arguments, threads=threads)


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
