"""Batches: samples of a split as rows of inputs, labels and document numbers (see samples.py).

B batch, L length. Loader processes import this module, which is why torch is imported for types
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from mamba_dist.data.samples import Samples

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
    and the sample of each row, NO_SAMPLE for a row that only fills up.
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


def pack(
    sources: Sequence[Samples], samples: Sequence[SampleId], *, pad_token_id: int
) -> PackedRows:
    """Samples of sources of one length as rows (B, L); NO_SAMPLE gives a row of padding.

    Raises:
        DataError: a shard or a plan is damaged there.
    """
    shape = len(samples), sources[0].length
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    seq_idx = np.zeros(shape, dtype=np.int32)
    for row, sample in enumerate(samples):
        if sample != NO_SAMPLE:
            source = sources[sample.source]
            _fill(source, sample.number, input_ids[row], labels[row], seq_idx[row])
    return PackedRows(input_ids, labels, seq_idx, tuple(samples))


def _fill(
    samples: Samples,
    number: int,
    input_ids: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    seq_idx: npt.NDArray[np.int32],
) -> None:
    stream, at, documents = samples.stream, 0, 0
    for span in samples.spans(number):
        start, end = span.start, at + span.length
        # The last label is the token after the last input, if the split has one more.
        ids, begins = stream.read(start, min(start + span.length + 1, stream.tokens))
        following = len(ids) - 1
        input_ids[at:end] = ids[: span.length]
        labels[at : at + following] = np.where(begins[1:], IGNORED_LABEL, ids[1:])
        begun = np.cumsum(begins[: span.length], dtype=np.int32)
        seq_idx[at:end] = documents + begun - begun[0]
        documents += int(begun[-1] - begun[0]) + 1
        at = end
    seq_idx[at:] = documents
