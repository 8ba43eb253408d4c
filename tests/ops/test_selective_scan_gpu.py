"""The GPU's selective scan, its kernels' sources run on the CPU, against the float64 reference."""

import ctypes
import math
from itertools import pairwise
from typing import Any

import emulated_kernels
import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import assert_identical, leaves, random_tensor, relative_error, run
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.nvrtc.kernel import Kernel
from mamba_dist.ops.selective_scan import gpu_launch, selective_scan

ROWS = {"u", "delta", "B", "C", "z"}


Launches = list[tuple[Kernel, Any]]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The kernels that ran, each with the `Call` that it got."""
    found: Launches = []

    def launch(kernel: Kernel, call: ctypes.Structure, **options: Any) -> None:
        found.append((kernel, call))
        launch_emulated(kernel, call, **options)

    monkeypatch.setattr(gpu_launch, "launch", launch)
    return found


def inputs(
    *, batch: int = 1, length: int = 70, channels: int = 16, d_state: int = 16, groups: int = 1
) -> dict[str, Tensor]:
    z = random_tensor(batch, length, channels, seed=7)
    z[:, 3::5] = 0  # where the output alone does not tell what the gate multiplied
    return {
        "u": random_tensor(batch, length, channels, seed=1),
        "delta": random_tensor(batch, length, channels, seed=2),
        "A": -torch.exp(0.5 * random_tensor(channels, d_state, seed=3)),
        "B": random_tensor(batch, length, groups, d_state, seed=4),
        "C": random_tensor(batch, length, groups, d_state, seed=5),
        "D": random_tensor(channels, seed=6),
        "z": z,
        "delta_bias": random_tensor(channels, seed=8) - 2,
        "initial_state": random_tensor(batch, channels, d_state, seed=9),
    }


def documents(batch: int, length: int) -> Tensor:
    # On borders of chunks, tiles and parts of the length, next to each other, and none at 0.
    starts = torch.zeros(batch, length, dtype=torch.int32)
    for first, second in pairwise([5, 6, 31, 32, 36, 64, 96, 130, 131]):
        if second < length:
            starts[:, [first, second]] = 1
    return starts.cumsum(1).to(torch.int32)


def assert_agrees(
    arguments: dict[str, Tensor], *, dtype: torch.dtype = torch.float32, **options: object
) -> None:
    arguments = leaves(arguments, dtype, ROWS)
    options = {"delta_softplus": True, **options}
    truth = run(
        selective_scan, leaves(arguments, torch.float64, set()), backend="reference", **options
    )
    found = run(selective_scan, arguments, backend="gpu", **options)
    errors = {}
    for name, value in truth.items():
        known = value.isfinite()  # not a step's gradient in a channel with an infinite A
        assert known.double().mean() > 0.9
        errors[name] = relative_error(found[name][known], value[known])
    wrong = {name: error for name, error in errors.items() if not error <= tolerance(dtype)}
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_documents", [False, True])
def test_outputs_and_all_gradients_agree(dtype: torch.dtype, with_documents: bool) -> None:
    arguments = inputs(batch=2, channels=32)
    assert_agrees(arguments, dtype=dtype, seq_idx=documents(2, 70) if with_documents else None)


def test_without_gate_skip_bias_softplus_and_states() -> None:
    arguments = inputs()
    for name in ("z", "D", "delta_bias", "initial_state"):
        del arguments[name]
    arguments["delta"] = arguments["delta"].abs()
    assert_agrees(arguments, delta_softplus=False)


def test_any_number_of_channels_groups_and_states() -> None:
    assert_agrees(inputs(length=33, channels=20, d_state=5, groups=2))
    assert_agrees(inputs(length=9, channels=16, d_state=40))


def test_a_row_cut_into_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_launch, "_splits", lambda *_: 3)
    # Two warps a block.
    assert_agrees(inputs(length=150, channels=32))
    assert_agrees(inputs(length=150, channels=32), seq_idx=documents(1, 150))


def test_states_that_do_not_decay_end_with_their_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_launch, "_splits", lambda *_: 3)
    arguments = inputs(length=150, channels=32)
    arguments["A"][:, :2] = torch.tensor([0.0, 0.01])
    assert_agrees(arguments, seq_idx=documents(1, 150))


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("A", [-math.inf, -3e38])
def test_states_that_decay_at_once_agree(A: float, length: int) -> None:
    arguments = inputs(length=length)
    arguments["A"][3, 5] = A
    assert_agrees(arguments)


def test_ids_of_64_bits_are_compared_whole() -> None:
    arguments, ids = leaves(inputs(), torch.float32, ROWS), documents(1, 70)
    narrow, wide = (
        run(selective_scan, arguments, backend="gpu", delta_softplus=True, seq_idx=seq_idx)
        for seq_idx in (ids, ids.long() << 32)
    )
    assert_identical(wide, narrow)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths_around_the_borders_of_chunks(length: int) -> None:
    assert_agrees(inputs(length=length))


def test_deterministic_gradients_do_not_depend_on_the_order_of_blocks(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three blocks: a sum of two numbers is the same in either order.
    arguments = inputs(channels=48)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        assert_agrees(arguments)
        for seed in (2, 3, 4):
            monkeypatch.setattr(emulated_kernels, "SEED", seed)
            given = leaves(arguments, torch.float32, ROWS)
            results.append(run(selective_scan, given, backend="gpu", delta_softplus=True))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert_identical(other, results[0])
    backward = [kernel for kernel, _ in launches if kernel.name == "selective_scan_backward"]
    assert all(("DETERMINISTIC", 1) in kernel.macros for kernel in backward)


def test_a_document_is_bit_identical_whatever_stands_before_it() -> None:
    arguments, seq_idx = leaves(inputs(), torch.float32, set()), documents(1, 70)
    first = selective_scan(**arguments, delta_softplus=True, seq_idx=seq_idx, backend="gpu")
    changed = {n: t.detach().clone() for n, t in arguments.items()}
    changed["u"][:, :36] = torch.nan
    second = selective_scan(**changed, delta_softplus=True, seq_idx=seq_idx, backend="gpu")
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert torch.equal(first[:, 36:], second[:, 36:])
    assert second[:, :36].isnan().all()


@pytest.mark.parametrize(("first", "in_place"), [(4, True), (2, False)])
def test_rows_that_are_views_of_wider_ones_are_read_in_place(
    first: int, in_place: bool, launches: Launches
) -> None:
    arguments = {name: tensor.float() for name, tensor in inputs().items()}
    expected = selective_scan(**arguments, delta_softplus=True, backend="gpu")
    launches.clear()
    views = dict(arguments)
    for name in ("u", "delta", "B", "C", "z"):
        wide = torch.full((1, 70, 40), torch.nan)
        part = wide[..., first : first + 16]
        views[name] = part.copy_(arguments[name].view(1, 70, 16)).view(arguments[name].shape)
    assert torch.equal(selective_scan(**views, delta_softplus=True, backend="gpu"), expected)
    ((_, call),) = launches
    for name in ("u", "delta", "B", "C", "z"):
        assert (getattr(call, name) == views[name].data_ptr()) == in_place, name


def test_fp64_is_refused_with_a_remedy() -> None:
    arguments = {name: tensor.double() for name, tensor in inputs(length=2).items()}
    with pytest.raises(BackendError, match=r"fp64.*ops_backend: torch"):
        selective_scan(**arguments, delta_softplus=True, backend="gpu")
