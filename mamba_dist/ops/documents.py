"""Document boundaries inside packed sequences, as `seq_idx` marks them.

A document starts wherever `seq_idx` differs from the position before; ids may repeat later in the
row. Position 0 is no reset: what comes before it is the initial state. B batch, L length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Positions [start, stop) of rows [first_row, last_row), all of one document in each row."""

    first_row: int
    last_row: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.last_row)

    @property
    def length(self) -> int:
        return self.stop - self.start


def reset_mask(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) bool, true where a new document starts; None if no document starts inside a row."""
    if seq_idx is None or seq_idx.shape[1] < 2:
        return None
    mask = torch.zeros_like(seq_idx, dtype=torch.bool)
    torch.ne(seq_idx[:, 1:], seq_idx[:, :-1], out=mask[:, 1:])
    return mask if bool(mask.any()) else None


def document_spans(seq_idx: Tensor | None, *, batch: int, length: int) -> list[Span]:
    """Spans that cover all rows, in order; one span over all rows if no document starts inside.

    Rows are split as soon as one of them has a boundary: then how a row is cut into spans, and so
    each bit of its result, does not depend on the other rows' boundaries.
    """
    resets = reset_mask(seq_idx)
    if resets is None:
        return [Span(0, batch, 0, length)]
    starts: list[list[int]] = [[0] for _ in range(batch)]
    for row, position in resets.nonzero().tolist():
        starts[row].append(position)
    return [
        Span(row, row + 1, start, stop)
        for row, row_starts in enumerate(starts)
        for start, stop in zip(row_starts, [*row_starts[1:], length], strict=True)
    ]
