"""The cuda backend around stand-ins of its packages: what they are given, and what comes of it.

The kernels themselves are tested where there is a GPU, in test_ops_on_gpu.py.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fake_cuda_packages
import pytest
import torch
from cuda_cases import (
    DTYPES,
    SCAN_PER_POSITION,
    SSD_PER_POSITION,
    conv_arguments,
    scan_arguments,
    ssd_arguments,
)
from fake_cuda_packages import Calls, elements_limited
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    LENGTHS,
    Arguments,
    assert_agrees,
    assert_autocast_changes_no_bit,
    assert_checkpointing_changes_no_bit,
    assert_inference_equals_training,
    assert_no_leak,
    document_ids,
    leaves,
    packed,
    random_tensor,
    relative_error,
    run,
)

from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import BackendError
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.selective_scan.gaps import GAP_STEP
from mamba_dist.ops.ssd import ssd


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return fake_cuda_packages.install(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "options"), [(1, False), (2, True)])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("calls")
def test_scan_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, groups: int, dtype: torch.dtype
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = scan_arguments(length=length, groups=groups, options=options, seq_idx=seq_idx)
    assert_agrees(selective_scan, arguments, dtype, SCAN_PER_POSITION, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "delta_softplus", "initial_state"])
@pytest.mark.usefixtures("calls")
def test_the_scan_without_one_option_equals_the_reference(absent: str, dtype: torch.dtype) -> None:
    arguments = scan_arguments(length=40, seq_idx=document_ids([1, 30, 1, 8], [40]))
    del arguments[absent]
    if absent == "delta_softplus":
        arguments["delta"] = arguments["delta"].abs() * 0.3
        arguments["delta_bias"] = arguments["delta_bias"].abs() * 0.3
    assert_agrees(selective_scan, arguments, dtype, SCAN_PER_POSITION, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "options"), [(1, False), (2, True)])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("calls")
def test_ssd_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, groups: int, dtype: torch.dtype
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = ssd_arguments(length=length, groups=groups, options=options, seq_idx=seq_idx)
    assert_agrees(ssd, arguments, dtype, SSD_PER_POSITION, backend="cuda", chunk_size=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "options"), [(2, True), (3, False), (4, False), (4, True)])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [*LENGTHS, 2, 3])
@pytest.mark.usefixtures("calls")
def test_conv_outputs_and_all_gradients_equal_the_reference(
    length: int, with_documents: bool, options: bool, width: int, dtype: torch.dtype
) -> None:
    seq_idx = packed(length) if with_documents else None
    arguments = conv_arguments(length=length, width=width, options=options, seq_idx=seq_idx)
    low_precision = {"x"}
    if dtype == torch.bfloat16 and options:
        # What a bf16 run leaves behind; other states are rounded to bf16.
        arguments["initial_state"] = arguments["initial_state"].bfloat16().double()
    assert_agrees(causal_conv1d, arguments, dtype, low_precision, backend="cuda")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_documents_equal_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    # Unsorted: ids return, below 0 too, and documents of one position stand next to each other.
    one_row = st.lists(st.integers(-2, 1), min_size=length, max_size=length)
    seq_idx = torch.tensor([draw(one_row) for _ in range(batch)], dtype=torch.int64)
    shape = {
        "batch": batch,
        "length": length,
        "options": draw(st.booleans()),
        "seq_idx": seq_idx,
    }
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda_packages.install(patch)
        for op, arguments, options in (
            (selective_scan, scan_arguments(**shape), {}),
            (ssd, ssd_arguments(**shape), {"chunk_size": 64}),
            (causal_conv1d, conv_arguments(**shape), {}),
        ):
            assert_agrees(op, arguments, torch.float32, set(), backend="cuda", **options)


@pytest.mark.parametrize(("row", "start", "stop"), [(0, 0, 30), (0, 30, 64), (1, 0, 130)])
@pytest.mark.usefixtures("calls")
def test_no_bit_leaks_between_documents(row: int, start: int, stop: int) -> None:
    shape: Any = {"batch": 2, "length": 130, "seq_idx": document_ids([30, 34, 66], [130])}
    for op, arguments, per_position in (
        (selective_scan, scan_arguments(**shape), SCAN_PER_POSITION),
        (causal_conv1d, conv_arguments(**shape), {"x"}),
    ):
        document = slice(start, stop)
        assert_no_leak(
            op, arguments, per_position, row=row, document=document, value=None, backend="cuda"
        )


def test_bf16_reaches_the_scan_kernel_as_bf16_channels_first(calls: Calls) -> None:
    arguments = scan_arguments(groups=2, seq_idx=document_ids([30, 33, 1], [64]))
    del arguments["initial_state"]
    selective_scan(**leaves(arguments, torch.bfloat16, SCAN_PER_POSITION), backend="cuda")
    (call,) = calls.selective_scan_fn
    assert {call[n].dtype for n in SCAN_PER_POSITION} == {torch.bfloat16}
    assert call["u"].shape == call["delta"].shape == call["z"].shape == (2, 6, 66)
    assert call["B"].shape == call["C"].shape == (2, 2, 4, 66)
    assert call["delta"][0, 0, 30] == call["delta"][0, 0, 64] == GAP_STEP
    assert (call["delta"][1, :, :2] == GAP_STEP).all()


def test_one_wide_input_keeps_the_scan_from_rounding_any(calls: Calls) -> None:
    arguments = scan_arguments() | {"initial_state": None}
    low_precision = SCAN_PER_POSITION - {"delta"}
    assert_agrees(selective_scan, arguments, torch.bfloat16, low_precision, backend="cuda")
    assert calls.selective_scan_fn[0]["u"].dtype == torch.float32


@pytest.mark.usefixtures("calls")
def test_inputs_in_any_memory_order_give_the_same_gradients() -> None:
    for op, arguments, per_position in (
        (selective_scan, scan_arguments(groups=2, seq_idx=packed(64)), SCAN_PER_POSITION),
        (ssd, ssd_arguments(groups=2, seq_idx=packed(64)), SSD_PER_POSITION),
        (causal_conv1d, conv_arguments(seq_idx=packed(64)), {"x"}),
    ):
        inputs = leaves(arguments, torch.float32, set())
        turned = {n: inputs[n].detach().mT.contiguous().mT.requires_grad_() for n in per_position}
        assert not any(tensor.is_contiguous() for tensor in turned.values())
        found = run(op, inputs | turned, backend="cuda")
        for name, value in run(op, inputs, backend="cuda").items():
            assert relative_error(found[name], value) < 1e-6, name


def test_the_final_state_costs_a_second_scan_only_if_its_gradient_is_used(calls: Calls) -> None:
    inputs = leaves(scan_arguments(), torch.float32, set())
    y, state = selective_scan(**inputs, return_final_state=True, backend="cuda")
    y.sum().backward(retain_graph=True)
    assert len(calls.selective_scan_fn) == 1
    state.sum().backward()
    assert len(calls.selective_scan_fn) == 2


def test_large_batches_are_scanned_in_turns(calls: Calls) -> None:
    seq_idx = document_ids([9, 1], [10], [5, 5], [1, 9], [10])
    shape: Any = {"batch": 5, "length": 10, "seq_idx": seq_idx}
    for op, arguments, limit, options in (
        (selective_scan, scan_arguments(**shape), 2 * 28 * 6, {}),
        (ssd, ssd_arguments(**shape), 2 * 64 * 64, {"chunk_size": 64}),
        (causal_conv1d, conv_arguments(**shape), 2 * 13 * 8, {}),
    ):
        with elements_limited(limit):
            assert_agrees(op, arguments, torch.float32, set(), backend="cuda", **options)
    first_calls = (
        calls.selective_scan_fn[0]["u"],
        calls.mamba_chunk_scan_combined[0]["x"],
        calls.causal_conv1d_fn[0]["x"],
    )
    assert [len(x) for x in first_calls] == [2, 2, 2]


@pytest.mark.usefixtures("calls")
def test_the_largest_tensor_may_be_that_of_the_groups() -> None:
    # 2 * (10 + 4) positions of 6 channels, and of 3 groups of 4.
    inputs = leaves(scan_arguments(batch=1, length=10, groups=3), torch.float32, set())
    with elements_limited(28 * 12):
        selective_scan(**inputs, backend="cuda")
    with elements_limited(28 * 12 - 1), pytest.raises(BackendError, match="has 336;"):
        selective_scan(**inputs, backend="cuda")


@pytest.mark.usefixtures("calls")
def test_a_row_beyond_32_bit_offsets_is_refused() -> None:
    for op, arguments in (
        (selective_scan, scan_arguments()),
        (ssd, ssd_arguments()),
        (causal_conv1d, conv_arguments()),
    ):
        inputs = leaves(arguments, torch.float32, set())
        with (
            elements_limited(100),
            pytest.raises(BackendError, match=rf"one row of {op.__name__} has .*backend: torch"),
        ):
            op(**inputs, backend="cuda")


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (selective_scan, scan_arguments(), "no float64 kernel for selective_scan"),
        (ssd, ssd_arguments(), "no float64 kernel for ssd"),
        (causal_conv1d, conv_arguments(), "no float64 kernel for causal_conv1d"),
        (selective_scan, scan_arguments(d_state=257), "d_state is 257"),
        (causal_conv1d, conv_arguments(width=5), "8 channels and width 5"),
        (causal_conv1d, conv_arguments(channels=12), "12 channels and width 4"),
        (ssd, ssd_arguments() | {"dt_softplus": False}, "no negative steps"),
    ],
)
@pytest.mark.usefixtures("calls")
def test_what_the_kernels_cannot_do_is_refused_with_a_remedy(
    op: Any, arguments: Arguments, message: str
) -> None:
    dtype = torch.float64 if "float64" in message else torch.float32
    with pytest.raises(BackendError, match=rf"{message}.*engine.ops_backend: torch"):
        op(**leaves(arguments, dtype, set()), backend="cuda")


@pytest.mark.parametrize(
    ("asked", "taken"), [(300, 256), (256, 256), (200, 128), (100, 64), (1, 64)]
)
def test_ssd_chunks_are_powers_of_two(asked: int, taken: int, calls: Calls) -> None:
    assert_agrees(ssd, ssd_arguments(), torch.float32, set(), backend="cuda", chunk_size=asked)
    assert calls.mamba_chunk_scan_combined[0]["chunk_size"] == taken


def test_fp32_products_are_kept_in_fp32_and_bf16_ones_left_alone(calls: Calls) -> None:
    for dtype, precision in ((torch.bfloat16, None), (torch.float32, "tf32x3")):
        ssd(**leaves(ssd_arguments(), dtype, SSD_PER_POSITION), backend="cuda")
        assert calls.triton_language.fp32_default == precision
    calls.triton_language.fp32_default = "tf32"
    ssd(**leaves(ssd_arguments(), torch.float32, set()), backend="cuda")
    assert calls.triton_language.fp32_default == "tf32"


@pytest.mark.parametrize(("offset", "in_place"), [(16, True), (4, False)])
def test_the_convolution_reads_a_slice_of_a_projection_in_place(
    offset: int, in_place: bool, calls: Calls
) -> None:
    projected = random_tensor(2, 20, 48, seed=1).to(torch.bfloat16)
    x = projected[..., offset : offset + 16]
    weight = random_tensor(16, 4, seed=2).float()
    y = causal_conv1d(x, weight, backend="cuda")
    assert torch.equal(y, causal_conv1d(x.contiguous(), weight, backend="cuda"))
    assert (calls.causal_conv1d_fn[0]["x"].data_ptr() == x.data_ptr()) is in_place


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("calls")
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    for op, arguments in (
        (selective_scan, scan_arguments(seq_idx=packed(64))),
        (ssd, ssd_arguments(seq_idx=packed(64))),
        (causal_conv1d, conv_arguments(seq_idx=packed(64))),
    ):
        assert_checkpointing_changes_no_bit(op, arguments, reentrant=reentrant, backend="cuda")


@pytest.mark.usefixtures("calls")
def test_neither_autocast_nor_inference_changes_a_bit() -> None:
    for op, arguments in (
        (selective_scan, scan_arguments(seq_idx=packed(64))),
        (ssd, ssd_arguments(seq_idx=packed(64))),
        (causal_conv1d, conv_arguments(seq_idx=packed(64))),
    ):
        assert_autocast_changes_no_bit(op, arguments, backend="cuda")
        assert_inference_equals_training(op, arguments, backend="cuda")


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
def test_a_model_learns_as_on_the_torch_backend(layer: str, calls: Calls) -> None:
    config = MambaConfig.model_validate(
        {"layer": layer, "d_model": 16, "n_layers": 2, "vocab_size": 32, "d_state": 8}
        | ({"headdim": 16} if layer == "mamba2" else {})
    )
    tokens = torch.randint(0, 32, (2, 50), generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("torch", "cuda"):
        model = MambaLM(config, backend=backend)
        initialize(model, config, seed=3, gather=lambda _: nullcontext())
        model(tokens, labels=tokens, seq_idx=document_ids([20, 30], [50])).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, truth in results[0].items():
        assert truth is not None
        assert relative_error(results[1][name], truth) < 1e-4, name
    assert len(calls.causal_conv1d_fn) == 2


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed")
def test_missing_packages_are_named_with_the_line_that_installs_them() -> None:
    with pytest.raises(BackendError, match=r"mamba_ssm.*pip install 'mamba-ssm"):
        selective_scan(**leaves(scan_arguments(), torch.float32, set()), backend="cuda")


def test_mamba_ssm_without_its_extension_is_not_taken_for_working(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    monkeypatch.setattr(interface, "selective_scan_cuda", None)
    with pytest.raises(BackendError, match="built without selective_scan_cuda"):
        selective_scan(**leaves(scan_arguments(), torch.float32, set()), backend="cuda")
    assert not calls.selective_scan_fn


def test_the_other_backends_import_nothing_of_it(tmp_path: Path) -> None:
    """Nor does choosing one, on a machine where both packages could be imported."""
    packages = ("mamba_ssm", "causal_conv1d")
    for package in packages:
        (tmp_path / f"{package}.py").touch()
    code = f"""
import sys, torch
from mamba_dist.ops.backend import describe_backends, resolve_backend
from mamba_dist.ops.causal_conv1d import causal_conv1d
for backend in (resolve_backend("auto", device_type="cpu"), "torch", "reference"):
    causal_conv1d(torch.ones(1, 9, 8), torch.ones(8, 4), backend=backend)
describe_backends("cpu")
print([name for name in {packages} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
