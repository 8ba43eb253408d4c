"""Document boundaries for a scan that knows none: positions that wipe out the state.

Before each document but a row's first there is one gap position with input 0, B = 0 and a huge
step, so that the decay exp(step A) is exactly 0: the state there is 0, and so is every gradient
that would flow to an input or parameter through it. Rows with fewer boundaries get the rest of
their gaps in front, where the state is 0 anyway, so the last position stays the row's own.

B batch, L length, L' length with gaps, W width.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.cuda_packages import USE_TORCH, document_starts
from mamba_dist.ops.first_order import first_order

# Exact in bf16. A backward multiplies it with gradients before the zero, so it must not be so large
# that a product overflows: 0 times infinity would be NaN.
GAP_STEP: Final = 2.0**40
# exp(GAP_STEP A) is 0 in fp32, subnormal numbers included, for any A below this.
_SLOWEST_A: Final = -1e-9


@dataclass(frozen=True)
class Gaps:
    """Where the positions of (B, L) rows go in rows of L' positions.

    `index` (B * L) int64 numbers the positions of all longer rows, row after row.
    """

    index: Tensor
    batch: int
    length: int

    def insert(self, values: Tensor, *, gap: float) -> Tensor:
        """(B, L', W) from (B, L, W), with `gap` at the gap positions."""
        rows = values.new_full((self.batch * self.length, values.shape[2]), gap)
        rows.index_copy_(0, self.index, values.flatten(0, 1))
        return rows.view(self.batch, self.length, -1)

    def remove(self, values: Tensor) -> Tensor:
        """(B, L, W) from (B, L', W), without the gap positions."""
        kept: Tensor = _Pick.apply(  # type: ignore[no-untyped-call]
            values.flatten(0, 1), self.index
        )
        return kept.view(self.batch, -1, values.shape[2])


def find_gaps(seq_idx: Tensor, A: Tensor) -> Gaps | None:
    """The gaps for `seq_idx` (B, L), or None if no document starts inside a row.

    Raises:
        BackendError: an entry of A is not negative enough for its state to be wiped out.
    """
    batch, length = seq_idx.shape
    starts_so_far = document_starts(seq_idx).cumsum(1)
    # One transfer, since each makes the host wait for the device.
    most, is_slow = torch.stack(
        [starts_so_far[:, -1].max(), (A >= _SLOWEST_A).any().to(starts_so_far)]
    ).tolist()
    if not most:
        return None
    if is_slow:
        raise BackendError(
            "ops backend 'cuda' separates the documents of a packed row only where A is below "
            f"{_SLOWEST_A:g}, and its largest entry is {A.max().item():g}; {USE_TORCH}"
        )
    positions = torch.arange(length, device=seq_idx.device) + starts_so_far
    positions = positions + (most - starts_so_far[:, -1:])
    rows = torch.arange(batch, device=seq_idx.device)[:, None] * (length + most)
    return Gaps((rows + positions).flatten(), batch, length + most)


class _Pick(torch.autograd.Function):
    """index_select whose backward writes each row once, where PyTorch's own adds with atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, index, grad), None
