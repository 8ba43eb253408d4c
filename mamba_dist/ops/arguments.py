"""Checks of the ops' arguments: a programmer's mistake raises ValueError."""

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor | None, *expected: int) -> None:
    """Raises ValueError unless `tensor` is None or has exactly the expected shape."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raises ValueError unless `tensor` has one dimension per comma-separated axis, none empty."""
    if tensor.dim() != axes.count(",") + 1 or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected non-empty ({axes})")


def check_floating(**tensors: Tensor | None) -> None:
    """Raises ValueError unless every given tensor is floating and all are on one device."""
    check_device(*tensors.values())
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype")


def check_device(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(map(str, devices))}")


def check_groups(name: str, channels: int, groups: int) -> None:
    """Raises ValueError unless the groups of B and C divide the channels or heads."""
    if channels % groups:
        raise ValueError(f"{name} {channels} is not divisible by the {groups} groups of B and C")


def check_seq_idx(seq_idx: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless `seq_idx` is None, or integer (B, L) on the device of x."""
    check_shape("seq_idx", seq_idx, *x.shape[:2])
    check_device(seq_idx, x)
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_idx is {seq_idx.dtype}, expected torch.int32")
