"""Whether the bytes of one record batch are what a shard's batch must be: place, order, range.

Needs no hash: it also finds what was written wrong in the first place.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mamba_dist.data.manifest import Manifest
from mamba_dist.data.shard import shard_schema
from mamba_dist.data.shard_index import BatchRecord

_ALIGNMENT = 8  # Arrow's messages begin at a multiple of it
_HEAD_BYTES = 8  # "ARROW1" and two zeros, before the first message

Fault = tuple[int, str]
"""A byte of the file, and what is wrong there."""


def batch_faults(
    region: memoryview, batch: BatchRecord, manifest: Manifest, *, start: int, previous_doc_id: int
) -> Iterator[Fault]:
    """Every kind of fault in a batch, at its first byte.

    `region` is the file from byte `start`, the end of the batch before, to the end of the batch's
    last buffer; `previous_doc_id` that batch's last, -1 for the first batch.
    """
    yield from _place_faults(region, batch, manifest, start=start)

    def array(at: int, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.frombuffer(region, dtype=dtype, count=count, offset=at - start)

    offsets = array(batch.offsets_at, batch.documents + 1, np.int64)
    values = array(batch.values_at, batch.tokens, manifest.dtype)
    doc_ids = array(batch.doc_ids_at, batch.documents, np.uint64)
    offset_faults = list(_offset_faults(offsets, batch))
    yield from offset_faults
    yield from _id_faults(values, batch, manifest)
    if not offset_faults:
        yield from _eos_faults(values[offsets[1:] - 1], offsets, batch, manifest)
    yield from _doc_id_faults(doc_ids, batch, previous_doc_id)


def _place_faults(
    region: memoryview, batch: BatchRecord, manifest: Manifest, *, start: int
) -> Iterator[Fault]:
    """Compares where Arrow finds the buffers with where the manifest says."""
    first = _HEAD_BYTES if start == 0 else -start % _ALIGNMENT
    source = pa.py_buffer(region)
    schema = shard_schema({}, np.dtype(manifest.dtype))
    try:
        with pa.BufferReader(pa.py_buffer(region[first:])) as stream:
            if start == 0:
                pa.ipc.read_message(stream)
            metadata = pa.ipc.read_message(stream)
        rows = pa.ipc.read_record_batch(metadata, schema)
        _, offsets, _, values = rows.column(0).buffers()
        _, doc_ids = rows.column(1).buffers()
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        yield start + first, f"holds no record batch that Arrow can read ({error})"
        return
    found = [start + one.address - source.address for one in (offsets, values, doc_ids)]
    found += [rows.num_rows, len(rows.column(0).values)]
    expected = [batch.offsets_at, batch.values_at, batch.doc_ids_at, batch.documents, batch.tokens]
    if found != expected:
        yield (
            start + first,
            f"does not lie as the manifest says (offsets, values, doc_ids, documents, tokens: "
            f"{found} in the file, {expected} in the manifest)",
        )


def _offset_faults(offsets: npt.NDArray[np.int64], batch: BatchRecord) -> Iterator[Fault]:
    at = batch.offsets_at
    if offsets[0] != 0:
        yield at, f"its first document begins at token {offsets[0]}, not at 0"
    if offsets[-1] != batch.tokens:
        yield (
            at + 8 * batch.documents,
            f"its last document ends at token {offsets[-1]}, not at {batch.tokens}",
        )
    falling = offsets[1:] <= offsets[:-1]
    if falling.any():
        first = int(falling.argmax()) + 1
        yield (
            at + 8 * first,
            f"its offsets do not rise: {offsets[first]} after {offsets[first - 1]}",
        )


def _id_faults(values: npt.NDArray[Any], batch: BatchRecord, manifest: Manifest) -> Iterator[Fault]:
    vocab_size = manifest.tokenizer.vocab_size
    if values.size and int(values.max()) >= vocab_size:
        first = int((values >= vocab_size).argmax())
        yield (
            batch.values_at + first * values.itemsize,
            f"holds id {values[first]}, outside the vocabulary of {vocab_size}",
        )


def _eos_faults(
    last: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    batch: BatchRecord,
    manifest: Manifest,
) -> Iterator[Fault]:
    wrong = last != manifest.tokenizer.eos_id
    if wrong.any():
        document = int(wrong.argmax())
        yield (
            batch.values_at + int(offsets[document + 1] - 1) * last.itemsize,
            f"its document {document} ends with id {last[document]}, not with the EOS "
            f"{manifest.tokenizer.eos_id}",
        )


def _doc_id_faults(
    doc_ids: npt.NDArray[np.uint64], batch: BatchRecord, previous: int
) -> Iterator[Fault]:
    if not doc_ids.size:
        return
    if int(doc_ids[0]) <= previous:
        yield batch.doc_ids_at, f"its doc_id {doc_ids[0]} does not come after {previous}"
    falling = doc_ids[1:] <= doc_ids[:-1]
    if falling.any():
        first = int(falling.argmax()) + 1
        yield (
            batch.doc_ids_at + 8 * first,
            f"its doc_ids do not rise: {doc_ids[first]} after {doc_ids[first - 1]}",
        )
