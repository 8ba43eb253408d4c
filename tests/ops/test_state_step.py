"""The GPU's kernels for one step, their sources run on the CPU, against the float64 reference.

Every other size is compiled again, so there are few of them.
"""

import ctypes
import math
from typing import Any

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import Arguments, leaves, relative_error
from step_cases import (
    OPS,
    OPTIONAL,
    PER_POSITION,
    STEPS,
    assert_step_agrees,
    conv_step,
    scan_step,
    ssd_step,
    without,
)
from torch import Tensor

from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.causal_conv1d import gpu as conv
from mamba_dist.ops.causal_conv1d import gpu_step
from mamba_dist.ops.nvrtc import state_step
from mamba_dist.ops.nvrtc.kernel import Kernel
from mamba_dist.ops.selective_scan import gpu_launch as scan_launch

in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """The kernels that ran."""
    found: list[Kernel] = []

    def launch(kernel: Kernel, call: ctypes.Structure, **options: Any) -> None:
        found.append(kernel)
        launch_emulated(kernel, call, **options)

    monkeypatch.setattr(state_step, "launch", launch)
    monkeypatch.setattr(gpu_step, "launch", launch)
    return found


def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with so many texts that lanes have several rows or channels each."""
    monkeypatch.setattr(state_step, "_WARPS_WANTED", 0)
    monkeypatch.setattr(gpu_step, "_LANES_WANTED", 0)


def agrees(op: str, arguments: Arguments, dtype: torch.dtype = torch.float32) -> None:
    assert_step_agrees(op, arguments, dtype, backend="gpu", limit=tolerance(dtype))


def macro(kernel: Kernel, name: str) -> int | str:
    return dict(kernel.macros)[name]


@in_both_precisions
@pytest.mark.parametrize("op", OPS)
def test_a_step_is_one_kernel_that_agrees(
    op: str, dtype: torch.dtype, launches: list[Kernel]
) -> None:
    agrees(op, STEPS[op](), dtype)
    # The state given up, and not.
    assert len(launches) == 2


@pytest.mark.parametrize(("op", "option"), [(op, o) for op in OPS for o in OPTIONAL[op]])
def test_a_step_agrees_without_any_one_option(op: str, option: str) -> None:
    agrees(op, without(STEPS[op](), option))


def test_a_step_agrees_without_softplus_and_with_rates_as_they_are() -> None:
    for op, softplus in (("scan", "delta_softplus"), ("ssd", "dt_softplus")):
        arguments = without(STEPS[op](), softplus, "A_is_log")
        arguments["A"] = -arguments["A"].exp()
        agrees(op, arguments)


@pytest.mark.parametrize("d_state", [1, 5, 24, 128, 256])
def test_any_number_of_states_and_odd_channels_and_heads(d_state: int) -> None:
    agrees("scan", scan_step(channels=7, d_state=d_state))
    agrees("ssd", ssd_step(heads=3, headdim=5, d_state=d_state, groups=1))


@in_both_precisions
def test_groups_have_their_own_inputs(dtype: torch.dtype) -> None:
    agrees("scan", scan_step(channels=9, d_state=20, groups=3), dtype)
    agrees("ssd", ssd_step(heads=6, headdim=3, d_state=20, groups=3), dtype)


@in_both_precisions
@pytest.mark.parametrize("d_state", [6, 16, 256])
def test_lanes_with_several_rows_or_channels(
    d_state: int, dtype: torch.dtype, launches: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd(monkeypatch)
    # As many as a channel has lanes, and as states of theirs fit into registers.
    items = {6: 2, 16: 4, 256: 2}[d_state]
    # A lane whose rows are not all there, and a block whose lanes are not.
    agrees("scan", scan_step(batch=5, channels=6, d_state=d_state, groups=2), dtype)
    assert macro(launches[-1], "ROWS") == items
    agrees("ssd", ssd_step(heads=2, headdim=12, d_state=d_state), dtype)
    assert macro(launches[-1], "RUN") == items
    agrees("ssd", ssd_step(heads=2, headdim=6, d_state=d_state), dtype)
    assert macro(launches[-1], "RUN") == 2


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [35, 36])
def test_convolutions_of_every_width(
    channels: int, width: int, launches: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    agrees("conv", conv_step(channels=channels, width=width))
    crowd(monkeypatch)
    agrees("conv", conv_step(channels=channels, width=width), torch.bfloat16)
    assert macro(launches[-1], "VECTOR") == (4 if channels == 36 else 1)


@torch.no_grad()
def test_a_convolution_leaves_out_the_state_that_nobody_wants() -> None:
    arguments = leaves(conv_step(), torch.float32, set())
    state = arguments["initial_state"].clone()
    y = OPS["conv"](**arguments, backend="gpu")
    assert torch.equal(arguments["initial_state"], state)
    assert torch.equal(y, OPS["conv"](**arguments, return_final_state=True, backend="gpu")[0])


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_state_given_up_is_where_the_new_one_lies(op: str) -> None:
    arguments = leaves(STEPS[op](), torch.float32, set())
    _, kept = OPS[op](**arguments, return_final_state=True, backend="gpu")
    assert kept.data_ptr() != arguments["initial_state"].data_ptr()
    _, donated = OPS[op](**arguments, return_final_state=True, donate_state=True, backend="gpu")
    assert donated is arguments["initial_state"]
    assert torch.equal(donated, kept)


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_state_that_no_kernel_can_write_to_is_left_alone(op: str) -> None:
    arguments = leaves(STEPS[op](), torch.float32, set())
    _, expected = OPS[op](**arguments, return_final_state=True, backend="gpu")
    state = arguments["initial_state"]
    for other in (state.mT.contiguous().mT, state.double()):
        before = other.clone()
        given = arguments | {"initial_state": other}
        _, found = OPS[op](**given, return_final_state=True, donate_state=True, backend="gpu")
        assert torch.equal(other, before)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_state_that_a_gradient_needs_is_not_overwritten(
    op: str, launches: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (scan_launch, conv):
        monkeypatch.setattr(module, "launch", launch_emulated)
    arguments = leaves(STEPS[op](), torch.float32, set())
    state = arguments["initial_state"].detach().clone()
    results = OPS[op](**arguments, return_final_state=True, donate_state=True, backend="gpu")
    assert all(result.requires_grad for result in results)
    assert torch.equal(arguments["initial_state"], state)
    assert not launches


@pytest.mark.parametrize("backend", ["reference", "torch", "gpu"])
@pytest.mark.parametrize("op", ["scan", "ssd"])
def test_A_log_gives_the_results_and_gradients_of_its_A(  # noqa: N802
    op: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_launch, "launch", launch_emulated)
    arguments = leaves(without(STEPS[op](), "A_is_log"), torch.float32, set())
    A_log = arguments.pop("A")
    found, expected = (
        [*results, *torch.autograd.grad(sum(r.sum() for r in results), A_log)]
        for results in (
            OPS[op](**arguments, A=A, return_final_state=True, backend=backend, **options)
            for A, options in ((A_log, {"A_is_log": True}), (-torch.exp(A_log), {}))
        )
    )
    assert all(map(torch.equal, found, expected))


@in_both_precisions
@pytest.mark.parametrize("first", [4, 3])
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_rows_are_read_in_place_from_wider_ones(
    op: str, first: int, dtype: torch.dtype, launches: list[Kernel]
) -> None:
    arguments = leaves(STEPS[op](), dtype, PER_POSITION)
    expected = OPS[op](**arguments, return_final_state=True, backend="gpu")
    views = dict(arguments)
    for name in PER_POSITION & views.keys():
        flat = arguments[name].flatten(2)
        wide = torch.full((2, 1, flat.shape[2] + 8), torch.nan, dtype=dtype)
        part = wide[..., first : first + flat.shape[2]].copy_(flat)
        views[name] = part.unflatten(2, arguments[name].shape[2:])
    found = OPS[op](**views, return_final_state=True, backend="gpu")
    assert all(map(torch.equal, found, expected))
    if op != "conv":
        assert macro(launches[-1], "WHOLE") == (first == 4)


@torch.no_grad()
def test_mixed_dtypes_are_computed_in_fp32() -> None:
    for op in ("scan", "ssd"):
        arguments = leaves(STEPS[op](), torch.bfloat16, PER_POSITION)
        narrow = OPS[op](**arguments, return_final_state=True, backend="gpu")
        arguments["B"] = arguments["B"].float()
        mixed = OPS[op](**arguments, return_final_state=True, backend="gpu")
        assert mixed[0].dtype == torch.bfloat16
        assert all(map(torch.equal, mixed, narrow))


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_text_is_bit_identical_whatever_the_texts_beside_it(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd(monkeypatch)
    arguments = leaves(STEPS[op](batch=5), torch.float32, set())
    together = OPS[op](**arguments, return_final_state=True, backend="gpu")
    per_text = PER_POSITION | {"initial_state"}
    alone = {n: v[2:3] if n in per_text else v for n, v in arguments.items()}
    found = OPS[op](**alone, return_final_state=True, backend="gpu")
    assert all(torch.equal(one[0], many[2]) for one, many in zip(found, together, strict=True))


@pytest.mark.parametrize("A", [-math.inf, -3e38, 0.0])
def test_states_that_decay_at_once_or_never_agree(A: float) -> None:
    for op in ("scan", "ssd"):
        arguments = without(STEPS[op](), "A_is_log")
        arguments["A"] = -arguments["A"].exp()
        arguments["A"].flatten()[3] = A
        agrees(op, arguments)


@torch.no_grad()
def test_an_infinite_input_is_infinite_in_its_channel_alone() -> None:
    # Of one state and without a skip, so that no infinities of both signs meet.
    arguments = leaves(without(scan_step(channels=3, d_state=1), "D"), torch.float32, set())
    arguments["u"][:, :, 1] = torch.inf
    found, expected = (
        OPS["scan"](**arguments, return_final_state=True, backend=name)
        for name in ("gpu", "reference")
    )
    for value, truth in zip(found, expected, strict=True):
        assert truth.isinf().any()
        torch.testing.assert_close(value, truth)


@torch.no_grad()
def test_more_states_than_a_step_holds_go_another_way(launches: list[Kernel]) -> None:
    agrees("ssd", ssd_step(d_state=260))
    assert not launches


def moved(tensor: Tensor) -> Tensor:
    """The same values where no four of them can be read at once."""
    room = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_nothing_is_read_where_it_is_not_aligned(
    op: str, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if crowded:
        crowd(monkeypatch)
    arguments = leaves(STEPS[op](), torch.float32, set())
    expected = OPS[op](**arguments, return_final_state=True, backend="gpu")
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            given = arguments | {name: moved(value)}
            found = OPS[op](**given, return_final_state=True, backend="gpu")
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_digit_of_a_wider_input_is_lost() -> None:
    for op in ("scan", "ssd"):
        arguments = leaves(STEPS[op](), torch.bfloat16, PER_POSITION - {"B"})
        arguments["B"] = arguments["B"].float()
        exact = {n: v.double() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        _, state = OPS[op](**arguments, return_final_state=True, backend="gpu")
        _, truth = OPS[op](**exact, return_final_state=True, backend="reference")
        assert relative_error(state, truth) <= 1e-5


@pytest.mark.parametrize("op", OPS)
def test_autograd_hears_of_a_state_that_was_written_over(op: str) -> None:
    arguments = leaves(STEPS[op](), torch.float32, set())
    arguments = {n: v.detach() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    state = arguments["initial_state"]
    factor = torch.ones_like(state, requires_grad=True)
    loss = (factor * state).sum()
    with torch.no_grad():
        OPS[op](**arguments, return_final_state=True, donate_state=True, backend="gpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", OPS)
def test_an_inference_tensor_is_written_over_in_its_own_mode_only(op: str) -> None:
    with torch.inference_mode():
        arguments = leaves(STEPS[op](), torch.float32, set())
        before = arguments["initial_state"].clone()
    options = {"return_final_state": True, "donate_state": True, "backend": "gpu"}
    with torch.no_grad():
        OPS[op](**arguments, **options)
        assert torch.equal(arguments["initial_state"], before)
    with torch.inference_mode():
        _, state = OPS[op](**arguments, **options)
        assert state is arguments["initial_state"]
