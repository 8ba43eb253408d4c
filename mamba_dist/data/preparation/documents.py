"""The documents in one slice of an input file, streamed, and the bad ones named by file and line.

Text and code: the file is the document. JSON lines: one document a line, at `text_field`. Parquet
and Arrow: one a row, in the column `text_field`; the line of a bad document is then its row, from
1.

No document is too large: a long text file is read as often as it is needed, a block at a time. Only
what has to be in memory at once, a JSON line or a table's cell, has a limit, and is bad beyond.
"""

import codecs
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mamba_dist.data.manifest import DEFAULT_MAX_RECORD_BYTES
from mamba_dist.data.preparation.byte_blocks import DECOMPRESSION_ERRORS, FileBlocks
from mamba_dist.data.preparation.folder_walk import unreadable
from mamba_dist.data.preparation.json_records import read_record
from mamba_dist.data.preparation.lines import lines_beginning_in, lines_of
from mamba_dist.data.preparation.sources import InputFile, InputSlice, whole
from mamba_dist.data.preparation.table_columns import Unusable
from mamba_dist.data.preparation.tables import TABLE_ERRORS, TableSlice
from mamba_dist.errors import DataError

Fault = Literal["not UTF-8", "broken JSON", "no text field", "empty", "too long"]

# A text file beyond this is not held in memory.
_LONG_BYTES = 1 << 20
# Names of fields may be as long as a record.
_DETAIL_CHARACTERS = 400


@dataclass(frozen=True)
class Reading:
    """What of a record is a document: its text, and its id in the source where it has one."""

    text_field: str
    id_field: str | None = None
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES


@dataclass(frozen=True)
class Document:
    """One document's text, the line (row) where it begins, from 1, and its id in the source.

    The id is a string or an integer there; what is neither, or is not UTF-8, counts as none.
    """

    text: str
    line: int
    source_id: str | None = None

    def texts(self) -> Iterator[str]:
        """The text as one string."""
        yield self.text


@dataclass(frozen=True)
class LongDocument:
    """A text file that is not held in memory."""

    texts: Callable[[], Iterator[str]]
    """Reads the text, in strings of a megabyte or so; each call reads the file again."""
    line: int = 1
    source_id: str | None = None


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used, and why."""

    file: str
    line: int
    fault: Fault
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.fault}" + (f" ({self.detail})" * bool(self.detail))


AnyDocument = Document | LongDocument | BadDocument


def read_documents(file: InputFile, text_field: str) -> Iterator[AnyDocument]:
    """Every document of a file in order, good or bad; only one is in memory at a time.

    Raises:
        DataError: see `SliceReader`.
    """
    return iter(SliceReader(whole(file), Reading(text_field)))


class SliceReader:
    """The documents of a slice, in order, good or bad; only one is in memory at a time.

    Their lines are counted from the slice's beginning. Iterating raises DataError if the file
    cannot be read, its compression is damaged or cut short, or a column is missing.
    """

    def __init__(self, piece: InputSlice, reading: Reading) -> None:
        self.lines = 0
        """Lines (rows) passed so far."""
        self.xxh3: str | None = None
        """Of the whole file, if all of it passed by."""
        self._piece = piece
        self._file = piece.file
        self._reading = reading

    def __iter__(self) -> Iterator[AnyDocument]:
        with _explained(self._file):
            if self._file.format == "jsonl":
                yield from self._json_lines()
            elif self._file.format == "text":
                yield self._text()
            else:
                yield from self._table()

    def _json_lines(self) -> Iterator[Document | BadDocument]:
        piece, most = self._piece, self._reading.max_record_bytes
        # Whether a line begins at the slice's first byte, the byte before it tells.
        blocks = FileBlocks(self._file, max(piece.start_bytes - 1, 0))
        if piece.is_whole:
            lines = lines_of(iter(blocks), most_bytes=most)
        else:
            lines = lines_beginning_in(
                iter(blocks), start=piece.start_bytes, stop=piece.stop_bytes, most_bytes=most
            )
        for raw in lines:
            self.lines += 1
            if raw is None:
                yield self._too_long(self.lines)
            elif raw and not raw.isspace():
                yield self._json_line(raw)
        self.xxh3 = blocks.xxh3

    def _json_line(self, raw: bytes) -> Document | BadDocument:
        reading, is_first = self._reading, self.lines == 1 and self._piece.start_bytes == 0
        try:
            record = read_record(raw, reading.text_field, first=is_first, id_field=reading.id_field)
        except UnicodeDecodeError as error:
            return self._bad("not UTF-8", error.reason)
        except (ValueError, RecursionError) as error:
            # A ValueError that is no JSONDecodeError: a number of more digits than Python converts.
            return self._bad("broken JSON", str(error))
        if not isinstance(record, dict):
            return self._bad(
                "no text field", f"the line is a {type(record).__name__}, not an object"
            )
        text = record.get(reading.text_field)
        if isinstance(text, str):
            identity = record.get(reading.id_field) if reading.id_field is not None else None
            return self._checked(text, identity)
        if reading.text_field in record:
            found = f"{reading.text_field!r} is {type(text).__name__}"
        else:
            found = "fields: " + ", ".join(list(record)[:8])
        return self._bad("no text field", found)

    def _text(self) -> AnyDocument:
        """The document that a text file is."""
        self.lines = 1
        data: list[bytes] = []
        size = 0
        blocks = FileBlocks(self._file)
        for block in blocks:
            data.append(block)
            size += len(block)
            if size > _LONG_BYTES:
                return self._long_text()
        self.xxh3 = blocks.xxh3
        try:
            # utf-8-sig: a byte order mark belongs to the encoding, not to the text.
            text = b"".join(data).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.lines = b"".join(data).count(b"\n", 0, error.start) + 1
            return self._bad("not UTF-8", error.reason)
        return self._checked(text)

    def _long_text(self) -> LongDocument | BadDocument:
        blocks = FileBlocks(self._file)
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        is_empty = True
        for block in blocks:
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                self.lines += bytes(error.object[: error.start]).count(b"\n")
                return self._bad("not UTF-8", error.reason)
            self.lines += text.count("\n")
            is_empty = is_empty and not text.strip()
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return self._bad("not UTF-8", error.reason)
        self.xxh3 = blocks.xxh3
        if is_empty:
            self.lines = 1
            return self._bad("empty", "")
        return LongDocument(lambda: _texts(self._file))

    def _table(self) -> Iterator[Document | BadDocument]:
        reading = self._reading
        columns = (reading.text_field, *([reading.id_field] if reading.id_field else []))
        table = TableSlice(self._piece, columns, most_bytes=reading.max_record_bytes)
        for row in table.rows():
            self.lines += 1
            text, *identity = row
            if any(isinstance(value, Unusable) and value.fault == "too long" for value in row):
                yield self._too_long(self.lines)
            elif isinstance(text, str):
                yield self._checked(text, *identity)
            elif isinstance(text, Unusable):
                yield self._bad(text.fault, text.detail)
            else:
                yield self._bad("no text field", f"the value is {type(text).__name__}")

    def _checked(self, text: str, identity: Any = None) -> Document | BadDocument:
        if not text or text.isspace():
            return self._bad("empty", "")
        if not _is_encodable(text):
            return self._bad("not UTF-8", "surrogates not allowed")
        has_id = isinstance(identity, str | int) and not isinstance(identity, bool)
        source_id = str(identity) if has_id else None
        if source_id is not None and not _is_encodable(source_id):
            source_id = None
        return Document(text, self.lines, source_id)

    def _too_long(self, line: int) -> BadDocument:
        limit = f"over {self._reading.max_record_bytes:,} bytes; see --max-record-bytes"
        return BadDocument(self._file.name, line, "too long", limit)

    def _bad(self, fault: Fault, detail: str) -> BadDocument:
        return BadDocument(self._file.name, self.lines, fault, detail[:_DETAIL_CHARACTERS])


def lines_before(piece: InputSlice) -> int:
    """Lines (rows) of the file before those of a slice: what to add to their numbers.

    Raises:
        DataError: the file cannot be read.
    """
    with _explained(piece.file):
        if piece.start_bytes == 0:
            return 0
        if piece.file.format != "jsonl":
            return TableSlice(piece, (), most_bytes=0).rows_before()
        with Path(piece.file.path).open("rb") as stream:
            # The line that is cut at the slice's beginning is among them.
            last, lines = b"\n", 0
            while block := stream.read(min(1 << 20, piece.start_bytes - stream.tell())):
                lines += block.count(b"\n")
                last = block[-1:]
            return lines + (last != b"\n")


def _is_encodable(text: str) -> bool:
    """Whether a text has bytes: JSON can spell a lone surrogate, "\\ud800", which has none."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _texts(file: InputFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _explained(file):
        try:
            for block in FileBlocks(file):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise has_changed(file) from error


def has_changed(file: InputFile) -> DataError:
    """What to say of an input that was written to while it was read."""
    return DataError(
        f"{file.path} changed while it was read; let it rest, and run again with --overwrite"
    )


@contextlib.contextmanager
def _explained(file: InputFile) -> Iterator[None]:
    try:
        yield
    except (*DECOMPRESSION_ERRORS, *TABLE_ERRORS) as error:
        raise DataError(
            f"{file.path} is damaged: {str(error).splitlines()[0]}; replace or --exclude it"
        ) from error
    except OSError as error:
        raise unreadable(file.path, error) from error
