"""One step of each op without gradients, as decoding takes it, against the float64 reference."""

from typing import Any

import torch
from op_comparison import Arguments, Op, leaves, random_tensor, relative_error
from torch import Tensor

from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

OPS: dict[str, Op] = {"scan": selective_scan, "ssd": ssd, "conv": causal_conv1d}
OPTIONAL = {
    "scan": ("D", "z", "delta_bias", "initial_state"),
    "ssd": ("D", "z", "dt_bias", "initial_state"),
    "conv": ("bias", "activation", "initial_state"),
}
PER_POSITION = {"u", "delta", "B", "C", "z", "x", "dt"}


def scan_step(batch: int = 2, channels: int = 20, d_state: int = 16, groups: int = 1) -> Arguments:
    """float64 inputs and options of one step."""
    return {
        "u": random_tensor(batch, 1, channels, seed=1),
        "delta": random_tensor(batch, 1, channels, seed=2),
        "A": random_tensor(channels, d_state, seed=3),
        "A_is_log": True,
        "B": random_tensor(batch, 1, groups, d_state, seed=4),
        "C": random_tensor(batch, 1, groups, d_state, seed=5),
        "D": random_tensor(channels, seed=6),
        "z": random_tensor(batch, 1, channels, seed=7),
        "delta_bias": random_tensor(channels, seed=8),
        "delta_softplus": True,
        "initial_state": random_tensor(batch, channels, d_state, seed=9),
    }


def ssd_step(
    batch: int = 2, heads: int = 4, headdim: int = 8, d_state: int = 16, groups: int = 2
) -> Arguments:
    """float64 inputs and options of one step."""
    return {
        "x": random_tensor(batch, 1, heads, headdim, seed=1),
        "dt": random_tensor(batch, 1, heads, seed=2),
        "A": random_tensor(heads, seed=3),
        "A_is_log": True,
        "B": random_tensor(batch, 1, groups, d_state, seed=4),
        "C": random_tensor(batch, 1, groups, d_state, seed=5),
        "D": random_tensor(heads, seed=6),
        "z": random_tensor(batch, 1, heads, headdim, seed=7),
        "dt_bias": random_tensor(heads, seed=8),
        "dt_softplus": True,
        "initial_state": random_tensor(batch, heads, headdim, d_state, seed=9),
    }


def conv_step(batch: int = 2, channels: int = 40, width: int = 4) -> Arguments:
    """float64 inputs and options of one step."""
    return {
        "x": random_tensor(batch, 1, channels, seed=1),
        "weight": random_tensor(channels, width, seed=2),
        "bias": random_tensor(channels, seed=3),
        "activation": "silu",
        # What a run in bf16 leaves behind; some backends round other states to it.
        "initial_state": random_tensor(batch, channels, width - 1, seed=4).bfloat16().double(),
    }


STEPS = {"scan": scan_step, "ssd": ssd_step, "conv": conv_step}


def without(arguments: Arguments, *names: str) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in names}


@torch.no_grad()
def assert_step_agrees(
    op: str,
    arguments: Arguments,
    dtype: torch.dtype,
    *,
    backend: str,
    limit: float,
    device: str = "cpu",
) -> None:
    """Equals the reference on the same rounded inputs, with the state given up and without."""
    given = leaves(arguments, dtype, PER_POSITION)
    exact = leaves(given, torch.float64, set())
    truth = OPS[op](**exact, return_final_state=True, backend="reference")
    for donates in (False, True):
        moved = _moved(given, device)
        before = {n: v.clone() for n, v in moved.items() if isinstance(v, Tensor)}
        found = OPS[op](**moved, return_final_state=True, donate_state=donates, backend=backend)
        for name, value, expected in zip(("y", "state"), found, truth, strict=True):
            assert value.shape == expected.shape
            error = relative_error(value, expected)
            assert error <= limit, f"{name}: {error:.1e} of {op} at {dtype}, donated {donates}"
        assert found[0].dtype == dtype
        assert found[1].dtype == torch.float32
        if donates:
            before.pop("initial_state", None)
        assert all(torch.equal(moved[name], value) for name, value in before.items())


def _moved(arguments: Arguments, device: str) -> Arguments:
    def move(value: Any) -> Any:
        return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in arguments.items()}
