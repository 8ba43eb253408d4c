"""Batches by concatenation: window i of a split is tokens i·L … i·L+L of its stream, so no padding.

The last token of a window is the label of the one before and the first of the next window. The rest
of the stream that fills no window (fewer than L+1 tokens) is left out of training, unless it is all
there is; validation pads it, so that every validation token counts.

B batch, L length. Loader processes import this module, which is why torch is imported for types
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from mamba_dist.data.dataset import TokenStream

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_LABEL = -100


class SampleId(NamedTuple):
    """A sample of a mixture: its source's index there, and its number in that source's epoch."""

    source: int
    number: int


NO_SAMPLE = SampleId(-1, -1)


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    `input_ids` (B, L) int64; `labels` (B, L) int64, the next token, or IGNORED_LABEL where that
    belongs to another document or to padding; `seq_idx` (B, L) int32, the document of each
    position, numbered from 0 in each row, padding being one of its own; `sample_ids`, the source
    and the window of each row, NO_SAMPLE for a row that only fills up.
    """

    input_ids: "Tensor"
    labels: "Tensor"
    seq_idx: "Tensor"
    sample_ids: tuple[SampleId, ...]


@dataclass(frozen=True)
class PackedRows:
    """A Batch as numpy arrays, in which form it leaves a loader process."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    seq_idx: npt.NDArray[np.int32]
    sample_ids: tuple[SampleId, ...]


def count_windows(tokens: int, length: int, *, pad_tail: bool) -> int:
    """Windows of `length` inputs in so many tokens; `pad_tail` counts the incomplete last one."""
    if tokens < 2:
        return 0  # nothing to predict
    full, tail = divmod(tokens - 1, length)
    return full + 1 if tail and (pad_tail or full == 0) else full


def pack(
    streams: Sequence[TokenStream],
    samples: Sequence[SampleId],
    *,
    length: int,
    pad_token_id: int,
) -> PackedRows:
    """Windows of the sources' streams as rows (B, L); NO_SAMPLE gives a row of padding."""
    rows = len(samples)
    input_ids = np.full((rows, length), pad_token_id, dtype=np.int64)
    labels = np.full((rows, length), IGNORED_LABEL, dtype=np.int64)
    seq_idx = np.zeros((rows, length), dtype=np.int32)
    for row, sample in enumerate(samples):
        if sample != NO_SAMPLE:
            start = sample.number * length
            _fill(streams[sample.source], start, input_ids[row], labels[row], seq_idx[row])
    return PackedRows(input_ids, labels, seq_idx, tuple(samples))


def _fill(
    stream: TokenStream,
    start: int,
    input_ids: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    seq_idx: npt.NDArray[np.int32],
) -> None:
    length = len(input_ids)
    ids, begins = stream.read(start, min(start + length + 1, stream.tokens))
    present = min(len(ids), length)
    input_ids[:present] = ids[:present]
    following = len(ids) - 1
    labels[:following] = np.where(begins[1:], IGNORED_LABEL, ids[1:])
    document = np.cumsum(begins[:present], dtype=np.int32)
    seq_idx[:present] = document - document[0]
    seq_idx[present:] = document[-1] - document[0] + 1
