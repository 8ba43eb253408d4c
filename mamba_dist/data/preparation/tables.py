"""The rows of Parquet and Arrow files, a few at a time, in columns of Python values.

A range of a table's bytes stands for the row groups (Parquet) or record batches (Arrow files) that
begin in it, the i-th of n being taken to begin at i/n of the file. An Arrow stream, which is what
Hugging Face datasets writes, has no index: the range that begins the file has all of it.
"""

import functools
import itertools
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mamba_dist.data.preparation.sources import InputFile, InputSlice
from mamba_dist.data.preparation.table_columns import ColumnValues, Unusable
from mamba_dist.errors import DataError

# The latter where the name of a column is damaged.
TABLE_ERRORS = (pa.ArrowException, UnicodeDecodeError)
_ROWS = 1024
# Of a few rows' values, where rows are long.
_SLICE_BYTES = 4 << 20
_PAGE_BYTES = 1 << 20
_FILE_MAGIC_BYTES = 8
_HEADER_FIELD, _COMPRESSION_FIELD = 2, 3


class TableSlice:
    """The rows of a slice of a file, in the columns that were asked for."""

    def __init__(self, piece: InputSlice, columns: tuple[str, ...], *, most_bytes: int) -> None:
        self._piece = piece
        self._columns = columns
        self._most_bytes = most_bytes

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Each row's values: str, int, None, or Unusable, as a string over `most_bytes` is.

        Raises:
            DataError: a column is missing, or several have its name.
            TABLE_ERRORS, OSError: the file is damaged or cannot be read.
        """
        if self._piece.file.format == "parquet":
            yield from self._parquet()
        else:
            yield from self._arrow()

    def rows_before(self) -> int:
        """The number of the file's rows that come before this slice.

        Raises:
            TABLE_ERRORS, OSError: the file is damaged or cannot be read.
        """
        file, end = self._piece.file, self._piece.start_bytes
        if file.format == "arrow_stream":
            return 0
        if file.format == "parquet":
            footer = _footer(file)
            return footer.rows_before[_members(InputSlice(file, 0, end), footer.groups).stop]
        # One column tells the rows: none could be asked for.
        reader = _opened_file(pa.py_buffer(_mapped(file)), fields=[0])
        batches = _members(InputSlice(file, 0, end), reader.num_record_batches)
        return sum(reader.get_batch(batch).num_rows for batch in batches)

    def _parquet(self) -> Iterator[tuple[Any, ...]]:
        footer = _footer(self._piece.file)
        # Otherwise the whole column of a row group is read at once.
        with pq.ParquetFile(
            self._piece.file.path,
            metadata=footer.metadata,
            pre_buffer=False,
            buffer_size=_PAGE_BYTES,
        ) as table:
            self._require_columns(footer.names)
            rows = _RowsOf(self._columns, most_bytes=self._most_bytes)
            for group in _members(self._piece, footer.groups):
                metadata = footer.metadata.row_group(group)
                row_bytes = self._row_bytes(metadata)
                # A page's header may have the value twice more, as the least and the greatest.
                if metadata.num_rows == 1 and row_bytes > 4 * self._most_bytes + _PAGE_BYTES:
                    yield tuple(Unusable("too long") for _ in self._columns)
                    continue
                for batch in table.iter_batches(
                    batch_size=min(max(1, _SLICE_BYTES // max(row_bytes, 1)), _ROWS),
                    row_groups=[group],
                    columns=list(self._columns),
                ):
                    for some in rows.of(batch):
                        yield from some

    def _row_bytes(self, group: pq.RowGroupMetaData) -> int:
        """Bytes of a row on average, of its longest column."""
        chunks = (group.column(index) for index in range(group.num_columns))
        sizes = (c.total_uncompressed_size for c in chunks if c.path_in_schema in self._columns)
        largest: int = max(sizes, default=0)
        return largest // max(int(group.num_rows), 1)

    def _arrow(self) -> Iterator[tuple[Any, ...]]:
        mapped = _mapped(self._piece.file)
        source = pa.py_buffer(mapped)
        is_file = self._piece.file.format == "arrow"
        open_ = pa.ipc.open_file if is_file else pa.ipc.open_stream
        names = open_(source).schema.names
        self._require_columns(names)
        fields = sorted({names.index(column) for column in self._columns})
        if is_file:
            reader = _opened_file(source, fields=fields)
            members = _members(self._piece, reader.num_record_batches)
            batches: Iterator[pa.RecordBatch] = map(reader.get_batch, members)
        else:
            options = pa.ipc.IpcReadOptions(included_fields=fields)
            stream = pa.ipc.open_stream(source, options=options)
            batches = iter(stream if self._piece.start_bytes == 0 else ())
        rows = _RowsOf(self._columns, most_bytes=self._most_bytes)
        for batch in batches:
            for some in rows.of(batch):
                yield from some
                # Pages that were read would stay in this process's memory.
                mapped.madvise(mmap.MADV_DONTNEED)

    def _require_columns(self, names: list[str]) -> None:
        path = self._piece.file.path
        for column, option in zip(self._columns, ("--text-field", "--id-field"), strict=False):
            if column not in names:
                raise DataError(
                    f"{path} has no column {column!r}, only {', '.join(names)}; choose one by "
                    f"{option}"
                )
            if names.count(column) > 1:
                raise DataError(
                    f"{path} has {names.count(column)} columns {column!r}, so which one is meant "
                    f"is unknown; choose another by {option}, or rename them"
                )


class _RowsOf:
    """The rows of one batch after the other, a few at a time."""

    def __init__(self, columns: tuple[str, ...], *, most_bytes: int) -> None:
        self._names = columns
        self._most_bytes = most_bytes
        self._columns: list[ColumnValues | None] = [None for _ in columns]

    def of(self, batch: pa.RecordBatch) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of a batch, in order."""
        columns = [
            ColumnValues(batch.column(name), most_bytes=self._most_bytes, before=before)
            for name, before in zip(self._names, self._columns, strict=True)
        ]
        self._columns = list(columns)
        start = 0
        while start < batch.num_rows:
            sizes = np.max([column.sizes(start, _ROWS) for column in columns], axis=0)
            # What is too long is not read.
            sizes[sizes > self._most_bytes] = 0
            count = max(1, int(np.searchsorted(sizes.cumsum(), _SLICE_BYTES, side="right")))
            yield list(zip(*(column.read(start, count) for column in columns), strict=True))
            start += count


@dataclass(frozen=True)
class _Footer:
    """What a Parquet file's end tells: `rows_before` has each group's, and last the file's rows."""

    metadata: pq.FileMetaData
    names: list[str]
    rows_before: list[int]

    @property
    def groups(self) -> int:
        return len(self.rows_before) - 1


# By the file's size and time, too: each unit of a large file asks for its footer, which may have
# thousands of row groups.
@functools.lru_cache(maxsize=2)
def _footer(file: InputFile) -> _Footer:
    with pq.ParquetFile(file.path) as table:
        metadata = table.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return _Footer(metadata, table.schema_arrow.names, [0, *itertools.accumulate(rows)])


def _members(piece: InputSlice, count: int) -> range:
    """The numbers, of `count`, of the row groups or batches that begin in a slice."""
    first, stop = (
        -(-edge * count // piece.file.bytes) for edge in (piece.start_bytes, piece.stop_bytes)
    )
    return range(first, stop)


def _opened_file(source: pa.Buffer, *, fields: list[int]) -> pa.ipc.RecordBatchFileReader:
    """An Arrow file, of which these fields at least can be read.

    Compressed ones are decompressed alone. Of others all are left where they lie, since picking
    some out of a file, not of a stream, has Arrow copy them: a batch may be larger than memory.
    """
    picked = fields if _is_compressed(source) else None
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=picked))


def _is_compressed(source: pa.Buffer) -> bool:
    """Whether the first batch of an Arrow file is; also if that cannot be told."""
    try:
        # Between a magic number and an index, a file is a stream.
        for message in pa.ipc.MessageReader.open_stream(source.slice(_FILE_MAGIC_BYTES)):
            if message.type == "record batch":
                return _has_compression(message.metadata.to_pybytes())
    except (*TABLE_ERRORS, OSError, struct.error):
        return True
    return False


def _has_compression(message: bytes) -> bool:
    """Whether a record batch's flatbuffer (format/Message.fbs of Apache Arrow) has `compression`,
    the fourth field of the table in the third field of a message.
    """
    (root,) = struct.unpack_from("<I", message)
    header = _field(message, root, _HEADER_FIELD)
    if header is None:
        return False
    (below,) = struct.unpack_from("<I", message, header)
    return _field(message, header + below, _COMPRESSION_FIELD) is not None


def _field(message: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table lies, None if it is left out."""
    (back,) = struct.unpack_from("<i", message, table)
    (length,) = struct.unpack_from("<H", message, table - back)
    at = 4 + 2 * number
    if at >= length:
        return None
    (offset,) = struct.unpack_from("<H", message, table - back + at)
    return table + offset if offset else None


def _mapped(file: InputFile) -> mmap.mmap:
    with Path(file.path).open("rb") as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise pa.ArrowInvalid(str(error)) from error  # an empty file
