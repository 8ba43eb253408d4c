"""The work on one unit: its documents are tokenised into one part file, committed by rename.

The bytes depend only on the unit and the settings, so a part that is made twice is the same part.
Nothing that grows with the unit is held in memory.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from mamba_dist.data.document_ids import IdNote
from mamba_dist.data.durable import quick_hash, sync_folder, unique_sibling
from mamba_dist.data.preparation.bad_documents import BadSpool
from mamba_dist.data.preparation.crew import Attempt, Station
from mamba_dist.data.preparation.deduplication import Halves, hash_text
from mamba_dist.data.preparation.documents import (
    BadDocument,
    Document,
    LongDocument,
    Reading,
    SliceReader,
    has_changed,
    lines_before,
)
from mamba_dist.data.preparation.fast_backends import Encoder, load_encoder, use_one_thread
from mamba_dist.data.preparation.folder_walk import unreadable
from mamba_dist.data.preparation.long_texts import (
    LONG_CHARACTERS,
    UncuttableError,
    cut_text,
    exact_cuts,
)
from mamba_dist.data.preparation.part_records import FileRecord, PartRecord, part_path
from mamba_dist.data.preparation.passing_text import PassingText, split_digest
from mamba_dist.data.preparation.sources import InputSlice, Unit
from mamba_dist.data.workers import WorkerFailure
from mamba_dist.errors import DataError

# Documents go to the tokenizer in groups, of at most so much text.
_GROUP_CHARACTERS = 1 << 20
# What has no place to be cut is encoded at once, at some hundred bytes of memory a character.
_UNCUT_SHARE = 16
_COPIED_BYTES = 1 << 20

Note = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class PartSettings:
    """What a worker needs besides the unit."""

    folder: str
    tokenizer: str
    eos_token: str
    eos_id: int
    vocab_size: int
    dtype: str
    reading: Reading
    train_split: float
    batch_documents: int
    backend: str
    max_bad: int
    deduplicate: bool = False


def tokenize_units(connection: Connection, station: Station) -> None:
    """A crew worker's life: units come in through the pipe, part records go out."""
    settings: PartSettings = station.payload
    use_one_thread()
    encoder = load_encoder(settings.backend, settings.tokenizer, eos_token=settings.eos_token)
    station.trace.set_ready()
    # So that a second death shows the very document, and takes the least memory. The ids do not
    # depend on the grouping.
    singly = dataclasses.replace(settings, batch_documents=1)
    try:
        while True:
            attempt: Attempt = connection.recv()
            chosen = singly if attempt.is_second else settings
            connection.send(_answer(attempt.task, chosen, encoder, note=station.trace.note))
    except (EOFError, ConnectionError):
        return  # nobody wants more


def _answer(
    unit: Unit, settings: PartSettings, encoder: Encoder, *, note: Note
) -> PartRecord | WorkerFailure:
    try:
        return make_part(unit, settings, encoder=encoder, note=note)
    except DataError as error:
        return WorkerFailure(str(error))
    except OSError as error:
        where = error.filename or settings.folder
        return WorkerFailure(
            f"{where}: {error.strerror or error}; mend that and run the same command again to "
            "continue"
        )


def place_in_unit(unit: Unit, numbers: Sequence[int]) -> str:
    """Where a worker was, by what `make_part` noted last."""
    first, first_line, last, last_line = numbers
    if not first:
        return f"at the beginning of {unit}"
    piece = unit.slices[first - 1]
    # Lines are counted from the beginning of their slice.
    begin_line = first_line + lines_before(piece)
    if not last:
        return f"reading {piece.file.path}" + f" after line {begin_line}" * bool(begin_line)
    begin = f"{piece.file.path}:{begin_line}"
    piece = unit.slices[last - 1]
    end = f"{piece.file.path}:{last_line + lines_before(piece)}"
    return f"at {end}" if begin == end else f"between {begin} and {end}"


def _not_noted(*numbers: int) -> None:
    """Nobody wants to know."""


def make_part(
    unit: Unit, settings: PartSettings, *, encoder: Encoder, note: Note = _not_noted
) -> PartRecord:
    """Tokenises a unit and commits its part.

    `note` hears where the work is, as (slice, line, last slice, last line) with slices from 1:
    of a group that is encoded its first and last document, while a slice is read the last document
    before (line 0: none yet), then the last two are 0.

    Raises:
        DataError: an input is damaged or has too many bad documents, the tokenizer gives
        impossible ids, or the disk is full.
    """
    final = part_path(Path(settings.folder), unit.index)
    staged = unique_sibling(final)
    writer = _PartWriter(unit, settings, encoder, note=note)
    try:
        with staged.open("wb") as stream:
            writer.write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        record = writer.commit()
        staged.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {final}: {error.strerror}; free some space and run the same command "
            f"again"
        ) from error
    finally:
        staged.unlink(missing_ok=True)
        writer.close()
    return record


@dataclass(frozen=True)
class _Piece:
    """A document's text, or a piece of it: `is_last` if the document ends here."""

    text: str
    line: int
    is_last: bool


class _PartWriter:
    def __init__(self, unit: Unit, settings: PartSettings, encoder: Encoder, *, note: Note) -> None:
        self._unit = unit
        self._slice = 0
        self._note = note
        self._settings = settings
        self._encoder = encoder
        self._dtype = np.dtype(settings.dtype).newbyteorder("<")
        self._hash = xxhash.xxh3_64()
        self._bytes = 0
        self._text_bytes = 0
        self._documents = 0
        self._tokens = 0
        # Tokens of the document whose pieces are in work.
        self._open_tokens = 0
        self._files: list[FileRecord] = []
        self._ids: IdNote | None = None

    def write(self, stream: BinaryIO) -> None:
        if self._settings.reading.id_field is not None:
            self._ids = IdNote(Path(self._settings.folder), self._unit.index)
        with (
            self._spool() as self._lengths,
            self._spool() as self._splits,
            self._spool() as self._keys,
            self._spool() as bad,
        ):
            self._bad = BadSpool(bad, max_bad=self._settings.max_bad)
            for group in self._groups():
                ids, lengths = self._encoder.encode_flat([piece.text for piece in group])
                self._check_ids(ids)
                is_last = np.array([piece.is_last for piece in group])
                self._put(stream, self._with_eos(ids, lengths, is_last))
                self._put_lengths(lengths + is_last, is_last)
            for spool in (self._lengths, self._splits, self._keys, bad):
                spool.seek(0)
                while block := spool.read(_COPIED_BYTES):
                    self._put(stream, np.frombuffer(block, dtype=np.uint8))

    def commit(self) -> PartRecord:
        """Commits what goes beside the part; its record."""
        return PartRecord(
            ids_xxh3=self._ids.commit() if self._ids is not None else None,
            unit=self._unit.index,
            documents=self._documents,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            bytes=self._bytes,
            xxh3=self._hash.hexdigest(),
            files=tuple(self._files),
            faults=dict(self._bad.faults),
            bad_bytes=self._bad.bytes,
        )

    def close(self) -> None:
        """Leaves nothing that was not committed."""
        if self._ids is not None:
            self._ids.discard()

    def _spool(self) -> "tempfile.SpooledTemporaryFile[bytes]":
        return tempfile.SpooledTemporaryFile(_COPIED_BYTES, dir=self._settings.folder)

    def _put(self, stream: BinaryIO, values: npt.NDArray[Any]) -> None:
        data = values.data
        stream.write(data)
        self._hash.update(data)
        self._bytes += values.nbytes

    def _put_lengths(self, tokens: npt.NDArray[np.int64], is_last: npt.NDArray[np.bool_]) -> None:
        """Adds up the tokens of the pieces to those of the documents that end with them."""
        ends = np.cumsum(tokens) + self._open_tokens
        lengths = np.diff(ends[is_last], prepend=0)
        self._open_tokens = int(ends[-1] - lengths.sum())
        self._lengths.write(lengths.astype("<i8").tobytes())
        self._tokens += int(tokens.sum())

    def _with_eos(
        self,
        ids: npt.NDArray[np.uint32],
        lengths: npt.NDArray[np.int64],
        is_last: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.unsignedinteger]:
        """The part's ids of a group: the texts' own, each document's end marked."""
        is_eos = np.zeros(ids.size + int(is_last.sum()), dtype=np.bool_)
        is_eos[(np.cumsum(lengths + is_last) - 1)[is_last]] = True
        marked = np.full(is_eos.size, self._settings.eos_id, dtype=self._dtype)
        marked[~is_eos] = ids
        return marked

    def _check_ids(self, ids: npt.NDArray[np.uint32]) -> None:
        vocab_size = self._settings.vocab_size
        if ids.size and int(ids.max()) >= vocab_size:
            first, last = self._unit.slices[0].file.name, self._unit.slices[-1].file.name
            raise DataError(
                f"the tokenizer gave id {int(ids.max())}, outside its vocabulary of "
                f"{vocab_size}, between {first} and {last}; use a consistent "
                f"tokenizer file"
            )

    def _groups(self) -> Iterator[list[_Piece]]:
        group: list[_Piece] = []
        characters = 0
        first = last = (0, 0)
        for piece in self._pieces():
            full = len(group) >= self._settings.batch_documents
            if group and (full or characters + len(piece.text) > _GROUP_CHARACTERS):
                self._note(*first, *last)
                yield group
                self._note(*last, 0, 0)
                group, characters = [], 0
            last = (self._slice, piece.line)
            first = first if group else last
            group.append(piece)
            characters += len(piece.text)
        if group:
            self._note(*first, *last)
            yield group

    def _pieces(self) -> Iterator[_Piece]:
        for number, source in enumerate(self._unit.slices, 1):
            self._slice = number
            self._note(number, 0, 0, 0)
            reader = SliceReader(source, self._settings.reading)
            documents, bad = self._documents, self._bad.faults.total()
            for document in reader:
                if isinstance(document, BadDocument):
                    self._bad.add(source, document)
                elif isinstance(document, Document) and len(document.text) <= LONG_CHARACTERS:
                    text = document.text.encode()
                    halves = hash_text(text) if self._settings.deduplicate else None
                    self._keep(document, split_digest(text), halves, text_bytes=len(text))
                    yield _Piece(document.text, document.line, is_last=True)
                else:
                    yield from self._long(source, document)
            documents, bad = self._documents - documents, self._bad.faults.total() - bad
            self._files.append(_describe(source, reader, documents=documents, bad=bad))

    def _long(self, source: InputSlice, document: Document | LongDocument) -> Iterator[_Piece]:
        """The pieces of a long document; nothing, and a bad document, if it cannot be cut."""
        settings = self._settings
        most = settings.reading.max_record_bytes // _UNCUT_SHARE
        cuts = exact_cuts(settings.backend, settings.tokenizer, eos_token=settings.eos_token)
        passing = PassingText(document)
        try:
            for _ in cut_text(passing, cuts, encoder=self._encoder, most_characters=most):
                pass
        except UncuttableError:
            detail = (
                f"{most:,} characters without a place where this tokenizer's ids allow a cut; see "
                "--max-record-bytes"
            )
            bad = BadDocument(source.file.name, document.line, "too long", detail)
            self._bad.add(source, bad)
            return
        halves = passing.halves if settings.deduplicate else None
        self._keep(document, passing.digest, halves, text_bytes=passing.bytes)
        # One piece is held back, since the last is to be known.
        held: str | None = None
        pieces = cut_text(document.texts(), cuts, encoder=self._encoder, most_characters=most)
        for text in pieces:
            if held is not None:
                yield _Piece(held, document.line, is_last=False)
            held = text
        assert held is not None
        yield _Piece(held, document.line, is_last=True)

    def _keep(
        self,
        document: Document | LongDocument,
        digest: int,
        halves: Halves | None,
        *,
        text_bytes: int,
    ) -> None:
        is_training = digest < int(self._settings.train_split * 2**64)
        self._splits.write(b"\0" if is_training else b"\1")
        if halves is not None:
            self._keys.write(np.array([*halves, text_bytes], dtype="<u8").tobytes())
        self._text_bytes += text_bytes
        self._documents += 1
        if self._ids is not None:
            self._ids.add(document.source_id)


def _describe(source: InputSlice, reader: SliceReader, *, documents: int, bad: int) -> FileRecord:
    file, path = source.file, Path(source.file.path)
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(file.path, error) from error
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.changed_at_ns):
        raise has_changed(file)
    xxh3 = None
    if source.start_bytes == 0:
        # A file of several slices is read once more by the first.
        xxh3 = reader.xxh3 or quick_hash(path)
    return FileRecord(
        file.name,
        file.bytes,
        source.start_bytes,
        source.stop_bytes,
        xxh3,
        documents,
        reader.lines,
        bad,
    )
