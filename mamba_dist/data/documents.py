"""The documents in one input file, streamed, and the bad ones named by file and line.

Text and code: the file is the document. JSON lines: one document a line, at `text_field`. Parquet
and Arrow: one a row, in the column `text_field`; the line of a bad document is then its row, from
1.
"""

import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from mamba_dist.data.json_records import read_record
from mamba_dist.data.sources import Compression, InputFile
from mamba_dist.errors import DataError

Fault = Literal["not UTF-8", "broken JSON", "no text field", "empty"]

_BLOCK_BYTES = 1 << 16  # compressed bytes read at a time; a block of zeros may expand 1000-fold
_ROWS = 1024
_GZIP_WINDOW_BITS = 31  # zlib: 15 bits of window, +16 for the gzip header


@dataclass(frozen=True)
class Document:
    """One document's text and the line (row) where it begins, from 1."""

    text: str
    line: int


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used, and why."""

    file: str
    line: int
    fault: Fault
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.fault}" + (f" ({self.detail})" * bool(self.detail))


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    "gzip": lambda: zlib.decompressobj(_GZIP_WINDOW_BITS),
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "xz": lzma.LZMADecompressor,
}


def read_documents(file: InputFile, text_field: str) -> Iterator[Document | BadDocument]:
    """Every document of a file in order, good or bad; only one is in memory at a time.

    Raises:
        DataError: the file cannot be read, its compression is damaged or cut short, or it has no
        column
            `text_field`.
    """
    try:
        if file.format == "parquet":
            yield from _parquet(file, text_field)
        elif file.format == "arrow":
            yield from _arrow(file, text_field)
        else:
            with Path(file.path).open("rb") as stream:
                blocks = _blocks(stream, file.compression)
                if file.format == "jsonl":
                    yield from _json_lines(file, blocks, text_field)
                else:
                    yield _whole(file, b"".join(blocks))
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{file.path} is damaged: {str(error).splitlines()[0]}; replace or --exclude it"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {file.path}: {error.strerror or error}; fix or --exclude it"
        ) from error


def _blocks(stream: BinaryIO, compression: Compression) -> Iterator[bytes]:
    if compression == "none":
        while block := stream.read(_BLOCK_BYTES):
            yield block
        return
    decompressor = _DECOMPRESSORS[compression]()
    fed = False
    while block := stream.read(_BLOCK_BYTES):
        while block:
            if decompressor.eof:
                decompressor = _DECOMPRESSORS[compression]()
            fed = True
            yield decompressor.decompress(block)
            block = decompressor.unused_data if decompressor.eof else b""
    # zstandard's own stream reader ends quietly on a stream that was cut short.
    if fed and not decompressor.eof:
        raise DataError(
            f"{stream.name} is cut short: its {compression} stream does not end; replace or "
            f"--exclude it"
        )


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        pending.append(first)
        for line in others:
            yield b"".join(pending)
            pending = [line]
    yield b"".join(pending)


def _whole(file: InputFile, data: bytes) -> Document | BadDocument:
    try:
        # utf-8-sig: a byte order mark belongs to the encoding, not to the text.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadDocument(file.name, line, "not UTF-8", error.reason)
    return _checked(file, text, line=1)


def _json_lines(
    file: InputFile, blocks: Iterator[bytes], text_field: str
) -> Iterator[Document | BadDocument]:
    for number, raw in enumerate(_lines(blocks), 1):
        if not raw or raw.isspace():
            continue
        try:
            record = read_record(raw, text_field, first=number == 1)
        except UnicodeDecodeError as error:
            yield BadDocument(file.name, number, "not UTF-8", error.reason)
        except (ValueError, RecursionError) as error:
            # A ValueError that is no JSONDecodeError: a number of more digits than Python converts.
            yield BadDocument(file.name, number, "broken JSON", str(error))
        else:
            yield _field(file, record, text_field, line=number)


def _field(
    file: InputFile, record: object, text_field: str, *, line: int
) -> Document | BadDocument:
    if not isinstance(record, dict):
        found = f"the line is a {type(record).__name__}, not an object"
        return BadDocument(file.name, line, "no text field", found)
    text = record.get(text_field)
    if isinstance(text, str):
        return _checked(file, text, line=line)
    found = f"{text_field!r} is {type(text).__name__}" if text_field in record else "fields: "
    found += "" if text_field in record else ", ".join(list(record)[:8])
    return BadDocument(file.name, line, "no text field", found)


def _checked(file: InputFile, text: str, *, line: int) -> Document | BadDocument:
    if not text or text.isspace():
        return BadDocument(file.name, line, "empty", "")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, "\ud800"
        return BadDocument(file.name, line, "not UTF-8", error.reason)
    return Document(text, line)


def _parquet(file: InputFile, text_field: str) -> Iterator[Document | BadDocument]:
    with pq.ParquetFile(file.path) as table:
        _require_column(file, table.schema_arrow.names, text_field)
        batches = table.iter_batches(batch_size=_ROWS, columns=[text_field])
        yield from _rows(file, (batch.column(0) for batch in batches))


def _arrow(file: InputFile, text_field: str) -> Iterator[Document | BadDocument]:
    with pa.memory_map(file.path) as source:
        is_file = source.read(6) == b"ARROW1"  # otherwise a stream, as Hugging Face datasets writes
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _require_column(file, reader.schema.names, text_field)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows(file, (batch.column(text_field) for batch in batches))


def _require_column(file: InputFile, names: list[str], text_field: str) -> None:
    if text_field not in names:
        raise DataError(
            f"{file.path} has no column {text_field!r}, only {', '.join(names)}; choose one by "
            "--text-field"
        )


def _rows(file: InputFile, columns: Iterator[Any]) -> Iterator[Document | BadDocument]:
    row = 0
    for column in columns:
        for start in range(0, len(column), _ROWS):
            for text in column.slice(start, _ROWS).to_pylist():
                row += 1
                if isinstance(text, str):
                    yield _checked(file, text, line=row)
                else:
                    found = f"the value is {type(text).__name__}"
                    yield BadDocument(file.name, row, "no text field", found)
