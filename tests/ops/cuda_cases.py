"""Inputs of each op that the cuda backend takes: A is negative, channels come in eights."""

import torch
from op_comparison import Arguments, random_tensor
from torch import Tensor

SCAN_PER_POSITION = {"u", "delta", "B", "C", "z"}
SSD_PER_POSITION = {"x", "dt", "B", "C", "z"}
DTYPES = (torch.float32, torch.bfloat16)


def scan_arguments(
    *,
    batch: int = 2,
    length: int = 64,
    channels: int = 6,
    d_state: int = 4,
    groups: int = 1,
    options: bool = True,
    seq_idx: Tensor | None = None,
) -> Arguments:
    """float64 inputs; `options` adds D, z, bias, softplus and an initial state."""
    required = {
        "u": random_tensor(batch, length, channels, seed=1),
        "delta": random_tensor(batch, length, channels, seed=2),
        "A": -torch.exp(random_tensor(channels, d_state, seed=3)),
        "B": random_tensor(batch, length, groups, d_state, seed=4),
        "C": random_tensor(batch, length, groups, d_state, seed=5),
        "seq_idx": seq_idx,
    }
    if not options:
        return required | {"delta": required["delta"].abs() * 0.3}
    return required | {
        "D": random_tensor(channels, seed=6),
        "z": random_tensor(batch, length, channels, seed=7),
        "delta_bias": random_tensor(channels, seed=8) - 2,
        "delta_softplus": True,
        "initial_state": random_tensor(batch, channels, d_state, seed=9),
    }


def ssd_arguments(
    *,
    batch: int = 2,
    length: int = 64,
    heads: int = 4,
    groups: int = 1,
    options: bool = True,
    seq_idx: Tensor | None = None,
) -> Arguments:
    """float64 inputs; `options` adds D, z, bias, softplus and an initial state."""
    required = {
        "x": random_tensor(batch, length, heads, 5, seed=1),
        "dt": random_tensor(batch, length, heads, seed=2),
        "A": -torch.exp(random_tensor(heads, seed=3)),
        "B": random_tensor(batch, length, groups, 3, seed=4),
        "C": random_tensor(batch, length, groups, 3, seed=5),
        "seq_idx": seq_idx,
    }
    if not options:
        return required | {"dt": required["dt"].abs() * 0.3}
    return required | {
        "D": random_tensor(heads, seed=6),
        "z": random_tensor(batch, length, heads, 5, seed=7),
        "dt_bias": random_tensor(heads, seed=8) - 2,
        "dt_softplus": True,
        "initial_state": random_tensor(batch, heads, 5, 3, seed=9),
    }


def conv_arguments(
    *,
    batch: int = 2,
    length: int = 64,
    channels: int = 8,
    width: int = 4,
    options: bool = True,
    seq_idx: Tensor | None = None,
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
