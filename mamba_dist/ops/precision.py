"""Precision rules of all ops: compute in fp32 (fp64 for fp64 input), whatever autocast says."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for an fp64 tensor, fp32 for every other floating dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_disabled(tensor: Tensor) -> torch.autocast:
    """Context in which autocast leaves ops on `tensor`'s device alone.

    A recurrence over thousands of steps in bf16 loses the state, so matmuls inside the ops must not
    be downcast. A backward needs it too: it sees the autocast state of whoever calls it.
    """
    return torch.autocast(device_type=tensor.device.type, enabled=False)
