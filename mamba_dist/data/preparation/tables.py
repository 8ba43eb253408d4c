"""The rows of Parquet and Arrow files, a few at a time, in columns of Python values.

A range of a table's bytes stands for the row groups (Parquet) or record batches (Arrow files) that
begin in it, the i-th of n being taken to begin at i/n of the file. An Arrow stream, which is what
Hugging Face datasets writes, has no index: the range that begins the file has all of it.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mamba_dist.data.preparation.sources import InputFile, InputSlice
from mamba_dist.errors import DataError

TABLE_ERRORS = (pa.ArrowInvalid, pa.ArrowNotImplementedError)
_ROWS = 1024
# Of one column's values at a time, where rows are long.
_SLICE_BYTES = 4 << 20
_PAGE_BYTES = 1 << 20


class TooLong:
    """Stands for a value that was not read."""


TOO_LONG = TooLong()


class TableSlice:
    """The rows of a slice of a file, in the columns that were asked for."""

    def __init__(self, piece: InputSlice, columns: tuple[str, ...], *, most_bytes: int) -> None:
        self._piece = piece
        self._columns = columns
        self._most_bytes = most_bytes

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Each row's values, TOO_LONG for a string of clearly more than `most_bytes`.

        Raises:
            DataError: a column is missing.
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
        if file.format == "parquet":
            with pq.ParquetFile(file.path) as table:
                groups = _members(InputSlice(file, 0, end), table.metadata.num_row_groups)
                return sum(table.metadata.row_group(group).num_rows for group in groups)
        if file.format == "arrow_stream":
            return 0
        reader = pa.ipc.open_file(pa.py_buffer(_mapped(file)))
        batches = _members(InputSlice(file, 0, end), reader.num_record_batches)
        return sum(reader.get_batch(batch).num_rows for batch in batches)

    def _parquet(self) -> Iterator[tuple[Any, ...]]:
        # Otherwise the whole column of a row group is read at once.
        with pq.ParquetFile(
            self._piece.file.path, pre_buffer=False, buffer_size=_PAGE_BYTES
        ) as table:
            self._require_columns(table.schema_arrow.names)
            for group in _members(self._piece, table.metadata.num_row_groups):
                metadata = table.metadata.row_group(group)
                row_bytes = self._row_bytes(metadata)
                if metadata.num_rows == 1 and row_bytes > self._most_bytes:
                    yield tuple(TOO_LONG for _ in self._columns)
                    continue
                for batch in table.iter_batches(
                    batch_size=min(max(1, _SLICE_BYTES // max(row_bytes, 1)), _ROWS),
                    row_groups=[group],
                    columns=list(self._columns),
                ):
                    for rows in self._rows_of(batch):
                        yield from rows

    def _row_bytes(self, group: pq.RowGroupMetaData) -> int:
        """Bytes of a row on average, of its longest column."""
        chunks = (group.column(index) for index in range(group.num_columns))
        sizes = (c.total_uncompressed_size for c in chunks if c.path_in_schema in self._columns)
        largest: int = max(sizes, default=0)
        return largest // max(int(group.num_rows), 1)

    def _arrow(self) -> Iterator[tuple[Any, ...]]:
        mapped = _mapped(self._piece.file)
        if self._piece.file.format == "arrow":
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            self._require_columns(reader.schema.names)
            members = _members(self._piece, reader.num_record_batches)
            batches: Iterator[pa.RecordBatch] = map(reader.get_batch, members)
        else:
            stream = pa.ipc.open_stream(pa.py_buffer(mapped))
            self._require_columns(stream.schema.names)
            batches = iter(stream if self._piece.start_bytes == 0 else ())
        for batch in batches:
            for rows in self._rows_of(batch):
                yield from rows
                # Pages that were read would stay in this process's memory.
                mapped.madvise(mmap.MADV_DONTNEED)

    def _rows_of(self, batch: pa.RecordBatch) -> Iterator[list[tuple[Any, ...]]]:
        start = 0
        while start < batch.num_rows:
            count = _ROWS
            columns = [batch.column(name).slice(start, count) for name in self._columns]
            while count > 1 and max(column.nbytes for column in columns) > _SLICE_BYTES:
                count //= 2
                columns = [column.slice(0, count) for column in columns]
            yield list(zip(*map(self._values, columns), strict=True))
            start += count

    def _values(self, column: pa.Array) -> list[Any]:
        # Some of the bytes are offsets and marks of absence.
        if len(column) == 1 and column.nbytes > self._most_bytes + _ROWS:
            return [TOO_LONG]
        values: list[Any] = column.to_pylist()
        return values

    def _require_columns(self, names: list[str]) -> None:
        for column, option in zip(self._columns, ("--text-field", "--id-field"), strict=False):
            if column not in names:
                raise DataError(
                    f"{self._piece.file.path} has no column {column!r}, only {', '.join(names)}; "
                    f"choose one by {option}"
                )


def _members(piece: InputSlice, count: int) -> list[int]:
    size = piece.file.bytes
    return [i for i in range(count) if piece.start_bytes <= i * size // count < piece.stop_bytes]


def _mapped(file: InputFile) -> mmap.mmap:
    with Path(file.path).open("rb") as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise pa.ArrowInvalid(str(error)) from error  # an empty file
