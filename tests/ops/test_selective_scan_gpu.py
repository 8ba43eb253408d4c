"""The GPU's selective scan, its kernels' sources run on the CPU, against the float64 reference."""

from itertools import pairwise

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import leaves, random_tensor, relative_error, run
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.selective_scan import gpu_launch, selective_scan

ROWS = {"u", "delta", "B", "C", "z"}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_launch, "launch", launch_emulated)


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
    errors = {name: relative_error(found[name], value) for name, value in truth.items()}
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
    assert_agrees(inputs(length=150))
    assert_agrees(inputs(length=150), seq_idx=documents(1, 150))


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths_around_the_borders_of_chunks(length: int) -> None:
    assert_agrees(inputs(length=length))


def test_deterministic_gradients_add_up_blocks_in_order() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert_agrees(inputs(channels=48))
    finally:
        torch.use_deterministic_algorithms(False)


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


def test_rows_that_are_views_of_wider_ones_are_read_in_place() -> None:
    arguments = {name: tensor.float() for name, tensor in inputs().items()}
    wide = random_tensor(1, 70, 40, seed=10).float()
    wide[..., 2:18], wide[..., 20:36] = arguments["u"], arguments["z"]
    views = {**arguments, "u": wide[..., 2:18], "z": wide[..., 20:36]}
    expected = selective_scan(**arguments, delta_softplus=True, backend="gpu")
    assert torch.equal(selective_scan(**views, delta_softplus=True, backend="gpu"), expected)


def test_fp64_is_refused_with_a_remedy() -> None:
    arguments = {name: tensor.double() for name, tensor in inputs(length=2).items()}
    with pytest.raises(BackendError, match=r"fp64.*ops_backend: torch"):
        selective_scan(**arguments, delta_softplus=True, backend="gpu")
