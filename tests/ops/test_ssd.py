"""SSD scan: the backends against the float64 loop, and what packing must never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    LENGTHS,
    TOLERANCE,
    Arguments,
    assert_a_step_agrees,
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

from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

PER_POSITION = {"x", "dt", "B", "C", "z"}

each_backend = pytest.mark.parametrize("backend", ["torch", "cpu"])


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


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, groups: int, dtype: torch.dtype, backend: str
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = ssd_arguments(length=length, groups=groups, options=options, seq_idx=seq_idx)
    assert_agrees(ssd, arguments, dtype, PER_POSITION, backend=backend)


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
    arguments = ssd_arguments(length=2048, headdim=16, d_state=16, seq_idx=seq_idx)
    assert_agrees(ssd, arguments, dtype, PER_POSITION, backend=backend)


@each_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_chunk_equals_the_reference_in_fp64(
    backend: str, data: st.DataObject
) -> None:
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
    options = {"chunk_size": chunk_size, "backend": backend}
    assert_agrees(ssd, arguments, torch.float64, PER_POSITION, **options)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("length", [1, 7, 66])
def test_gradients_equal_finite_differences(backend: str, length: int) -> None:
    seq_idx = None if length == 1 else document_ids([2, length - 2])
    arguments = ssd_arguments(
        batch=1, length=length, heads=2, headdim=2, d_state=2, seq_idx=seq_idx
    )
    options = {"chunk_size": 3, "backend": backend}
    assert_finite_differences(ssd, arguments, fast=length > 7, **options)


@each_backend
def test_one_state_per_head_is_the_selective_scan_with_a_repeated_decay(backend: str) -> None:
    arguments = ssd_arguments(length=70, heads=4, headdim=3, d_state=5, seq_idx=packed(70))
    y = ssd(**arguments, backend=backend)

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


@each_backend
def test_strong_decay_gives_finite_gradients(backend: str) -> None:
    arguments = ssd_arguments(length=130, options=False)
    arguments["A"] = torch.full((4,), -50.0, dtype=torch.float64)
    arguments["dt"] = arguments["dt"] * 20
    results = run(ssd, leaves(arguments, torch.float32, set()), backend=backend)
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
    assert_agrees(ssd, arguments, torch.float32, PER_POSITION, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("at", [1, 83, 149])
def test_two_halves_chained_by_the_state_equal_the_whole(backend: str, at: int) -> None:
    assert_halves_chain(ssd, ssd_arguments(length=150), PER_POSITION, at=at, backend=backend)


@each_backend
def test_a_packed_row_equals_its_documents_alone(backend: str) -> None:
    arguments = ssd_arguments(batch=1, length=100)
    assert_packed_equals_alone(ssd, arguments, PER_POSITION, [33, 1, 66], backend=backend)


@each_backend
@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("row", "start", "stop"), [(0, 0, 30), (0, 30, 64), (0, 64, 130), (1, 0, 130)]
)
def test_no_bit_leaks_between_documents(
    row: int, start: int, stop: int, value: float | None, backend: str
) -> None:
    arguments = ssd_arguments(batch=2, length=130, seq_idx=document_ids([30, 34, 66], [130]))
    how = {"row": row, "document": slice(start, stop), "value": value, "backend": backend}
    assert_no_leak(ssd, arguments, PER_POSITION, **how)


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, backend: str) -> None:
    arguments = ssd_arguments(length=70, seq_idx=packed(70))
    assert_checkpointing_changes_no_bit(ssd, arguments, reentrant=reentrant, backend=backend)


@each_backend
def test_autocast_changes_no_bit(backend: str) -> None:
    assert_autocast_changes_no_bit(ssd, ssd_arguments(length=70), backend=backend)


@each_backend
def test_two_runs_are_bit_identical(backend: str) -> None:
    arguments = ssd_arguments(length=130, headdim=64, d_state=64)
    assert_two_runs_are_identical(ssd, arguments, backend=backend)


@each_backend
def test_strided_inputs_give_the_same_bits(backend: str) -> None:
    arguments = ssd_arguments(length=70, groups=2)
    assert_strides_change_no_bit(ssd, arguments, PER_POSITION, backend=backend)


@each_backend
def test_without_gradients_the_output_is_the_same(backend: str) -> None:
    assert_inference_equals_training(ssd, ssd_arguments(length=70), backend=backend)


@each_backend
def test_one_output_without_a_gradient_is_fine(backend: str) -> None:
    inputs = leaves(ssd_arguments(length=20), torch.float64, set())
    for pick in (0, 1):
        found, truth = (
            torch.autograd.grad(
                ssd(**inputs, return_final_state=True, backend=name)[pick].sum(),
                [inputs["dt"], inputs["initial_state"]],
            )
            for name in (backend, "reference")
        )
        assert all(relative_error(f, t) < 1e-12 for f, t in zip(found, truth, strict=True))


@each_backend
def test_neither_states_nor_mixing_matrices_of_all_chunks_exist(backend: str) -> None:
    batch, length, heads, headdim, d_state = 2, 1024, 4, 16, 16
    arguments = leaves(
        ssd_arguments(batch=batch, length=length, heads=heads, headdim=headdim, d_state=d_state),
        torch.float32,
        set(),
    )
    history = batch * length * heads * headdim * d_state
    sizes: list[int] = []
    with saved_bytes(sizes), largest_tensor() as largest:
        run(ssd, arguments, backend=backend)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    arguments = ssd_arguments(length=300, heads=10, headdim=16, seq_idx=packed(300))
    assert_threads_change_no_bit(ssd, arguments, dtype, PER_POSITION, backend="cpu")


@pytest.mark.parametrize("options", [False, True])
def test_the_kernels_read_nothing_that_nobody_wrote(options: bool) -> None:
    seq_idx = packed(300) if options else None
    arguments = ssd_arguments(length=300, heads=5, options=options, seq_idx=seq_idx)
    assert_poisoned_memory_changes_no_bit(ssd, arguments, backend="cpu")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_kernels_take_sizes_that_fill_no_vector(data: st.DataObject) -> None:
    draw = data.draw
    # A gradient of a single number is one sum, which may cancel to less than fp32 can resolve.
    groups, length = draw(st.integers(1, 2)), draw(st.integers(20, 300))
    heads, headdim = groups * draw(st.integers(3, 7)), draw(st.integers(1, 70))
    cut = draw(st.integers(1, length))
    arguments = ssd_arguments(
        batch=draw(st.integers(1, 2)),
        length=length,
        heads=heads,
        headdim=headdim,
        d_state=draw(st.integers(1, 40)),
        groups=groups,
        options=draw(st.booleans()),
    )
    if draw(st.booleans()):
        arguments["seq_idx"] = document_ids(*[[cut, length - cut]] * len(arguments["x"]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    assert_agrees(ssd, arguments, dtype, PER_POSITION, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [False, True])
def test_decoding_step_by_step_equals_the_reference(options: bool, dtype: torch.dtype) -> None:
    arguments = ssd_arguments(length=6, headdim=8, d_state=20, groups=2, options=options)
    inputs = leaves(arguments, dtype, PER_POSITION)
    exact = leaves(inputs, torch.float64, PER_POSITION)
    state, outputs = inputs.pop("initial_state", None), []
    with torch.no_grad():
        for t in range(6):
            now = {n: v[:, t : t + 1] if n in PER_POSITION else v for n, v in inputs.items()}
            y, state = ssd(**now, initial_state=state, return_final_state=True, backend="cpu")
            outputs.append(y)
    truth, final = ssd(**exact, return_final_state=True, backend="reference")
    assert relative_error(torch.cat(outputs, dim=1), truth) < TOLERANCE[dtype]
    assert relative_error(state, final) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_of_a_large_state_is_shared_by_threads(threads: int) -> None:
    # 2 * 40 * 32 * 64 elements of state, above what one thread does alone.
    arguments = ssd_arguments(length=1, heads=40, headdim=32, d_state=64)
    assert_a_step_agrees(ssd, arguments, threads=threads)


@pytest.mark.parametrize("position", [0, 40, 63, 64, 130])
@pytest.mark.parametrize("name", ["x", "dt", "B", "z"])
def test_a_nan_reaches_no_output_before_it(name: str, position: int) -> None:
    arguments = ssd_arguments(length=140)
    arguments[name][0, position] = float("nan")
    y = ssd(**leaves(arguments, torch.float32, set()), backend="cpu")
    assert y[0, :position].isfinite().all()
    assert y[0, position].isnan().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("large", [1e6, 1e12, 1e30])
def test_a_step_that_forgets_everything_leaves_the_others_exact(large: float) -> None:
    arguments = ssd_arguments(length=70, options=False)
    arguments["dt"] = torch.full_like(arguments["dt"], 0.1)
    arguments["dt"][:, 20] = large
    arguments["x"][:, 20] = 0
    found, truth = (
        ssd(**leaves(arguments, dtype, set()), return_final_state=True, backend=backend)
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference"))
    )
    for ours, exact in zip(found, truth, strict=True):
        assert relative_error(ours, exact) < TOLERANCE[torch.float32]


def test_a_rate_of_minus_infinity_forgets_at_once() -> None:
    arguments = ssd_arguments(length=70)
    arguments["A"][0] = -float("inf")
    found, truth = (
        ssd(**leaves(arguments, dtype, set()), backend=backend)
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference"))
    )
    assert relative_error(found, truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mixed_precisions_are_computed_in_the_widest(x_dtype: torch.dtype) -> None:
    inputs = leaves(ssd_arguments(length=70, seq_idx=packed(70).long()), torch.float32, set())
    for name, dtype in (("x", x_dtype), ("dt", torch.bfloat16), ("C", torch.bfloat16)):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    found = run(ssd, inputs, backend="cpu")
    truth = run(ssd, leaves(inputs, torch.float64, set()), backend="reference")
    for name, value in truth.items():
        tolerance = TOLERANCE.get(found[name].dtype, TOLERANCE[torch.bfloat16])
        assert relative_error(found[name], value) < tolerance, name
        if name.startswith("d "):
            assert found[name].dtype == inputs[name[2:]].dtype


def test_turned_memory_gives_the_same_bits() -> None:
    inputs = leaves(ssd_arguments(length=70, groups=2), torch.float32, set())
    turned = dict(inputs)
    for name in PER_POSITION:
        turned[name] = inputs[name].detach().mT.contiguous().mT.requires_grad_()
    assert_identical(run(ssd, turned, backend="cpu"), run(ssd, inputs, backend="cpu"))


@pytest.mark.parametrize("options", [False, True])
def test_the_operators_keep_the_dispatchers_rules(options: bool) -> None:
    arguments = ssd_arguments(length=70, headdim=8, d_state=8, options=options)
    inputs = leaves(arguments, torch.float32, set())
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "seq_idx", "initial_state")
    tensors = [inputs.get(name) for name in names]
    operators = torch.ops.mamba_dist
    torch.library.opcheck(operators.ssd_cpu.default, (*tensors, options, 16, True))
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    y, final, states = operators.ssd_cpu(*detached, options, 16, True)
    gradients = (torch.ones_like(y), torch.ones_like(final) if options else None)
    given = (*gradients, *detached, states, options, 16)
    torch.library.opcheck(operators.ssd_cpu_backward.default, given)


def test_compiling_changes_no_bit_and_breaks_no_graph() -> None:
    arguments = ssd_arguments(length=70, headdim=8, d_state=8, seq_idx=packed(70))

    def scan(**inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return ssd(**inputs, backend="cpu")

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    inputs = leaves(arguments, torch.float32, set())
    assert_identical(run(compiled, inputs), run(scan, inputs))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), scan(**inputs))
