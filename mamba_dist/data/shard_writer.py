"""Writing shards: documents in, Arrow files of bounded size out, cut by the documents alone.

Where a batch or a shard ends depends only on the sequence of documents, never on how they arrive.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mamba_dist.data.durable import hash_file, stretch_hashes, sync_file
from mamba_dist.data.shard import batch_end, locate_buffers, shard_schema
from mamba_dist.data.shard_index import ShardRecord, shard_name
from mamba_dist.errors import DataError

Ids = npt.NDArray[np.unsignedinteger]


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents end to end: `ids` (tokens,), `lengths` and `doc_ids` (documents,)."""

    ids: Ids
    lengths: npt.NDArray[np.int64]
    doc_ids: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.lengths)

    def cut(self, count: int) -> "tuple[Documents, Documents]":
        """The first `count` documents, and the others."""
        tokens = int(self.lengths[:count].sum())
        head = Documents(self.ids[:tokens], self.lengths[:count], self.doc_ids[:count])
        return head, Documents(self.ids[tokens:], self.lengths[count:], self.doc_ids[count:])


class ShardWriter:
    """Writes the shards of one split into a folder, named `<split>-00000.arrow` and up."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        metadata: dict[str, str],
        shard_bytes: int,
        batch_tokens: int,
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(metadata["dtype"])
        self._vocab_size = int(metadata["vocab_size"])
        self._schema = shard_schema(metadata, self._dtype)
        self._shard_tokens = max(1, shard_bytes // self._dtype.itemsize)
        self._batch_tokens = batch_tokens
        self._pending: list[Documents] = []
        self._pending_tokens = 0
        self._open: tuple[Path, pa.OSFile, pa.RecordBatchFileWriter] | None = None
        self._open_tokens = 0
        self._finished: list[Path] = []

    def add(self, documents: Documents) -> None:
        """Appends documents.

        Raises:
            DataError: an id does not lie in the vocabulary, or the disk is full.
        """
        if documents.ids.size and int(documents.ids.max()) >= self._vocab_size:
            raise DataError(
                f"id {int(documents.ids.max())} is outside the vocabulary of {self._vocab_size}; "
                "the tokenizer file is inconsistent"
            )
        while len(documents):
            ends = np.cumsum(documents.lengths) + self._pending_tokens
            count = int(np.searchsorted(ends, self._batch_tokens, side="right"))
            if count == 0 and not self._pending:
                count = 1  # a document longer than a batch is a batch of its own
            head, documents = documents.cut(count)
            self._keep(head)
            if len(documents):
                self._flush()

    def finish(self) -> list[ShardRecord]:
        """Completes the last shard; the records of all, hashed and on the disk."""
        self._flush()
        self._close()
        return [self._record(path) for path in self._finished]

    def _keep(self, documents: Documents) -> None:
        if len(documents):
            self._pending.append(documents)
            self._pending_tokens += int(documents.lengths.sum())

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._open and self._open_tokens + self._pending_tokens > self._shard_tokens:
            self._close()
        lengths = np.concatenate([part.lengths for part in self._pending])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.concatenate([part.ids for part in self._pending])
        doc_ids = np.concatenate([part.doc_ids for part in self._pending])
        rows = pa.LargeListArray.from_arrays(
            pa.array(offsets), pa.array(ids), type=self._schema.field("tokens").type
        )
        batch = pa.record_batch([rows, pa.array(doc_ids)], schema=self._schema)
        try:
            self._writer().write_batch(batch)
        except OSError as error:
            raise DataError(f"cannot write a shard in {self._folder}: {error}") from error
        self._open_tokens += self._pending_tokens
        self._pending, self._pending_tokens = [], 0

    def _writer(self) -> pa.RecordBatchFileWriter:
        if self._open is None:
            path = self._folder / shard_name(self._split, len(self._finished))
            sink = pa.OSFile(str(path), "wb")
            self._open = (path, sink, pa.ipc.new_file(sink, self._schema))
            self._open_tokens = 0
        return self._open[2]

    def _close(self) -> None:
        if self._open is None:
            return
        path, sink, writer = self._open
        try:
            writer.close()
            sink.close()
            sync_file(path)
        except OSError as error:
            raise DataError(f"cannot finish shard {path}: {error}") from error
        self._open = None
        self._finished.append(path)

    def _record(self, path: Path) -> ShardRecord:
        located = locate_buffers(path)
        stretches = stretch_hashes(path, [batch_end(batch, self._dtype) for batch in located])
        batches = tuple(
            dataclasses.replace(batch, xxh3=xxh3)
            for batch, xxh3 in zip(located, stretches, strict=True)
        )
        hashes = hash_file(path)
        return ShardRecord(
            split=self._split,
            file=path.name,
            documents=sum(batch.documents for batch in batches),
            tokens=sum(batch.tokens for batch in batches),
            batches=batches,
            bytes=hashes.bytes,
            xxh3=hashes.xxh3,
            sha256=hashes.sha256,
        )
