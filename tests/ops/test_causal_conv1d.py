"""Causal convolution: each backend against the float64 loop, and no leak in packed rows."""

import pytest
import torch
import torch.nn.functional as F
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
    leaves,
    packed,
    random_tensor,
    relative_error,
    run,
)
from torch.fx.experimental.proxy_tensor import make_fx

from mamba_dist.ops.causal_conv1d import causal_conv1d

PER_POSITION = {"x"}
# Whole vectors and a broken one, for every width of vector.
CHANNELS = 40
backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


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


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [*LENGTHS, 2, 3, 4])
def test_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, dtype: torch.dtype, backend: str
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = conv_arguments(length=length, channels=CHANNELS, options=options, seq_idx=seq_idx)
    assert_agrees(causal_conv1d, arguments, dtype, PER_POSITION, backend=backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_long_sequence_equals_the_reference(
    with_documents: bool, dtype: torch.dtype, backend: str
) -> None:
    seq_idx = document_ids([700, 1, 1347], [2048]) if with_documents else None
    arguments = conv_arguments(length=2048, channels=CHANNELS, seq_idx=seq_idx)
    assert_agrees(causal_conv1d, arguments, dtype, PER_POSITION, backend=backend)


@backends
@pytest.mark.parametrize("channels", [3000, 70000])
def test_tiles_of_few_steps_equal_the_reference(channels: int, backend: str) -> None:
    arguments = conv_arguments(length=50, channels=channels, seq_idx=document_ids([48, 2], [50]))
    if channels > 10000:
        # One step per tile: taps reach over several tiles back.
        arguments = conv_arguments(length=7, channels=channels)
    assert_agrees(causal_conv1d, arguments, torch.float32, PER_POSITION, backend=backend)


@backends
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_equals_the_reference_in_fp64(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    one_row = st.lists(st.integers(0, 5), min_size=length, max_size=length).map(sorted)
    ids = [draw(one_row) for _ in range(batch)]
    arguments = conv_arguments(
        batch=batch,
        length=length,
        channels=draw(st.integers(1, 5)),
        width=draw(st.integers(1, 9)),
        options=draw(st.booleans()),
        seq_idx=draw(st.sampled_from([None, torch.tensor(ids, dtype=torch.int32)])),
    )
    assert_agrees(causal_conv1d, arguments, torch.float64, PER_POSITION, backend=backend)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_of_the_native_kernels_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    # From 256 steps on (2 rows) the kernels take longer tiles.
    length = draw(st.integers(1, 100) | st.integers(256, 400))
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)) | {length})
    documents = [stop - start for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)]
    arguments = conv_arguments(
        length=length,
        # Whole and broken vectors of every width; few channels would let a sum cancel to nothing.
        channels=draw(st.integers(9, 80)),
        width=draw(st.integers(1, 8)),
        options=draw(st.booleans()),
        seq_idx=draw(st.sampled_from([None, document_ids(documents, [length])])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    assert_agrees(causal_conv1d, arguments, dtype, PER_POSITION, backend="cpu")


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_gradients_equal_finite_differences(backend: str, length: int) -> None:
    seq_idx = None if length == 1 else document_ids([1, length - 1])
    arguments = conv_arguments(batch=1, length=length, channels=2, seq_idx=seq_idx)
    assert_finite_differences(causal_conv1d, arguments, fast=False, backend=backend)


@backends
def test_without_documents_it_is_the_padded_convolution_of_pytorch(backend: str) -> None:
    arguments = conv_arguments(length=30)
    arguments["initial_state"] = None
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    padded = F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., :30]
    assert relative_error(causal_conv1d(**arguments, backend=backend), F.silu(padded).mT) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("at", [1, 2, 17])
def test_two_halves_chained_by_the_state_equal_the_whole(backend: str, at: int) -> None:
    arguments = conv_arguments(length=30)
    assert_halves_chain(causal_conv1d, arguments, PER_POSITION, at=at, backend=backend)


@backends
def test_a_packed_row_equals_its_documents_alone(backend: str) -> None:
    arguments = conv_arguments(batch=1, length=40)
    lengths = [5, 1, 2, 30, 2]
    assert_packed_equals_alone(causal_conv1d, arguments, PER_POSITION, lengths, backend=backend)


@backends
def test_the_final_state_is_the_last_inputs_of_the_last_document(backend: str) -> None:
    arguments = conv_arguments(length=8, seq_idx=document_ids([6, 2], [8]))
    _, state = causal_conv1d(**arguments, return_final_state=True, backend=backend)
    assert torch.equal(state[0, :, 0], torch.zeros(6))
    assert torch.equal(state[0, :, 1:], arguments["x"][0, 6:].T)
    assert torch.equal(state[1], arguments["x"][1, 5:].T)


@backends
def test_the_final_state_tells_documents_apart_that_share_an_id(backend: str) -> None:
    arguments = conv_arguments(length=8, seq_idx=document_ids([6, 1, 1], [8]))
    _, state = causal_conv1d(**arguments, return_final_state=True, backend=backend)
    assert arguments["seq_idx"][0, -1] == arguments["seq_idx"][0, 5]
    assert torch.equal(state[0, :, :2], torch.zeros(6, 2))
    assert torch.equal(state[0, :, 2], arguments["x"][0, 7])


@backends
def test_a_short_sequence_keeps_the_end_of_the_initial_state(backend: str) -> None:
    arguments = conv_arguments(length=2)
    _, state = causal_conv1d(**arguments, return_final_state=True, backend=backend)
    assert torch.equal(state[..., 0], arguments["initial_state"][..., -1])
    assert torch.equal(state[..., 1:], arguments["x"].mT)


@backends
@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize(("row", "start", "stop"), [(0, 0, 5), (0, 5, 6), (0, 6, 40), (1, 0, 40)])
def test_no_bit_leaks_between_documents(
    row: int, start: int, stop: int, value: float | None, backend: str
) -> None:
    seq_idx = document_ids([5, 1, 34], [40])
    arguments = conv_arguments(length=40, channels=CHANNELS, seq_idx=seq_idx)
    assert_no_leak(
        causal_conv1d,
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
    arguments = conv_arguments(length=70, seq_idx=packed(70))
    assert_checkpointing_changes_no_bit(
        causal_conv1d, arguments, reentrant=reentrant, backend=backend
    )


@backends
def test_autocast_changes_no_bit(backend: str) -> None:
    assert_autocast_changes_no_bit(causal_conv1d, conv_arguments(length=70), backend=backend)


@backends
def test_two_runs_are_bit_identical(backend: str) -> None:
    arguments = conv_arguments(length=300, channels=512)
    assert_two_runs_are_identical(causal_conv1d, arguments, backend=backend)


@backends
def test_strided_inputs_give_the_same_bits(backend: str) -> None:
    arguments = conv_arguments(length=70, channels=CHANNELS)
    assert_strides_change_no_bit(causal_conv1d, arguments, PER_POSITION, backend=backend)


@backends
@pytest.mark.parametrize("length", [1, 70])
def test_without_gradients_the_output_is_the_same(length: int, backend: str) -> None:
    assert_inference_equals_training(causal_conv1d, conv_arguments(length=length), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels"), [(1, 40000), (100, 520), (700, 100)])
def test_the_number_of_threads_changes_no_bit(
    length: int, channels: int, dtype: torch.dtype
) -> None:
    arguments = conv_arguments(length=length, channels=channels, seq_idx=packed(length))
    assert_threads_change_no_bit(causal_conv1d, arguments, dtype, PER_POSITION, backend="cpu")


@pytest.mark.parametrize("length", [1, 70])
def test_the_native_kernels_write_every_output(length: int) -> None:
    arguments = conv_arguments(length=length, channels=CHANNELS, seq_idx=packed(length))
    assert_poisoned_memory_changes_no_bit(causal_conv1d, arguments, backend="cpu")


def test_turned_memory_gives_the_same_bits() -> None:
    inputs = leaves(conv_arguments(length=70, channels=CHANNELS), torch.float32, set())
    turned = inputs | {"x": inputs["x"].detach().mT.contiguous().mT.requires_grad_()}
    options = {"return_final_state": True, "backend": "cpu"}
    results = []
    for arguments in (turned, inputs):
        y, _ = causal_conv1d(**arguments, **options)
        (gradient,) = torch.autograd.grad(y.sum(), arguments["x"])  # of stride 0 itself
        results.append({"y": y, "d x": gradient})
    assert_identical(*results)


@backends
def test_half_precision_is_computed_in_fp32(backend: str) -> None:
    arguments = conv_arguments(length=70)
    arguments["x"] = arguments["x"].half()
    y, state = causal_conv1d(**arguments, return_final_state=True, backend=backend)
    exact = arguments | {"x": arguments["x"].double()}
    truth, _ = causal_conv1d(**exact, return_final_state=True, backend="reference")
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)
    assert relative_error(y, truth) < 2**-11


@backends
def test_ids_of_64_bits_are_compared_whole(backend: str) -> None:
    arguments = conv_arguments(length=6, seq_idx=document_ids([2, 4], [6]))
    y = causal_conv1d(**arguments, backend=backend)
    arguments["seq_idx"] = arguments["seq_idx"].long() << 32
    assert torch.equal(causal_conv1d(**arguments, backend=backend), y)


@backends
def test_one_output_without_a_gradient_is_fine(backend: str) -> None:
    for pick in (0, 1):
        inputs = leaves(conv_arguments(length=9), torch.float32, set())
        found = causal_conv1d(**inputs, return_final_state=True, backend=backend)[pick].sum()
        truth = causal_conv1d(**inputs, return_final_state=True, backend="reference")[pick].sum()
        gradients = [torch.autograd.grad(loss, inputs["x"])[0] for loss in (found, truth)]
        assert relative_error(*gradients) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("options", [False, True])
def test_the_operators_keep_the_dispatchers_rules(options: bool) -> None:
    arguments = conv_arguments(length=9, options=options, seq_idx=packed(9) if options else None)
    inputs = leaves(arguments, torch.float32, set())
    tensors = [inputs.get(n) for n in ("x", "weight", "bias", "seq_idx", "initial_state")]
    operators = torch.ops.mamba_dist
    torch.library.opcheck(operators.causal_conv1d_cpu.default, (*tensors, options, options))
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    y, state = operators.causal_conv1d_cpu(*detached, options, options)
    gradients = (torch.ones_like(y), torch.ones_like(state) if options else None)
    given = (*gradients, *detached, options)
    torch.library.opcheck(operators.causal_conv1d_cpu_backward.default, given)


@pytest.mark.parametrize("length", [1, 70])
def test_compiling_changes_no_bit_and_breaks_no_graph(length: int) -> None:
    def native(**inputs: object) -> object:
        return causal_conv1d(**inputs, backend="cpu")

    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    inputs = leaves(conv_arguments(length=length, seq_idx=packed(length)), torch.float32, set())
    assert_identical(run(compiled, inputs), run(native, inputs))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), native(**inputs))


def test_a_traced_decoding_step_holds_the_operator() -> None:
    inputs = leaves(conv_arguments(length=1), torch.float32, set())

    def decode(x: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(**inputs | {"x": x}, backend="cpu")

    with torch.no_grad():
        traced = make_fx(decode)(inputs["x"])
        assert torch.equal(traced(2 * inputs["x"]), decode(2 * inputs["x"]))


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
