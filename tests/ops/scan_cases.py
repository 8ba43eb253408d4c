"""Inputs of the selective scan for its tests."""

import torch
from op_comparison import Arguments, random_tensor

PER_POSITION = {"u", "delta", "B", "C", "z"}
# Whole vectors and a broken one, for every width of vector; d_state likewise for groups of n.
CHANNELS, D_STATE = 40, 11


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
