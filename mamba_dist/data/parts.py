"""The work on one unit: its documents are tokenised into one part file, committed by rename.

A part is the unit's ids end to end (little-endian, EOS after each document), then one int64 length
and one uint8 split (0 train, 1 val) for each document; if duplicates are to go, then three uint64
for each: both halves of its text's hash, and the text's bytes. Its counts and hash stand in the
journal.
The bytes depend only on the unit and the settings, so a part that is made twice is the same part.
"""

import dataclasses
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from mamba_dist.data.crew import Attempt, Station
from mamba_dist.data.deduplication import hash_text
from mamba_dist.data.documents import BadDocument, Document, read_documents
from mamba_dist.data.durable import quick_hash, sync_folder, unique_sibling
from mamba_dist.data.fast_backends import Encoder, load_encoder, use_one_thread
from mamba_dist.data.sources import InputFile, Unit
from mamba_dist.data.workers import WorkerFailure
from mamba_dist.errors import DataError

# Documents go to the tokenizer in groups, of at most so much text.
_GROUP_CHARACTERS = 4 << 20
_SPLIT_SEED = 0x6D616D6261
_KEY_BYTES = 24

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
    text_field: str
    train_split: float
    batch_documents: int
    backend: str
    deduplicate: bool = False


@dataclass(frozen=True)
class FileRecord:
    """What one input file gave."""

    name: str
    bytes: int
    xxh3: str
    documents: int


@dataclass(frozen=True)
class PartRecord:
    """A committed part; one journal line."""

    unit: int
    documents: int
    tokens: int
    text_bytes: int
    bytes: int
    xxh3: str
    files: tuple[FileRecord, ...]
    bad: tuple[BadDocument, ...]

    def to_json(self) -> dict[str, Any]:
        """The journal line."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(line: dict[str, Any]) -> "PartRecord":
        """The record of a journal line."""
        files = tuple(FileRecord(**file) for file in line["files"])
        bad = tuple(BadDocument(**document) for document in line["bad"])
        return PartRecord(**{**line, "files": files, "bad": bad})


def part_path(folder: Path, unit: int) -> Path:
    """Where the part of a unit lies."""
    return folder / f"unit-{unit:08d}.part"


def is_training_document(text: bytes, train_split: float) -> bool:
    """Whether a document is for training: told by its content, so equal texts never part."""
    return xxhash.xxh3_64_intdigest(text, seed=_SPLIT_SEED) < int(train_split * 2**64)


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


def place_in_unit(unit: Unit, numbers: Sequence[int]) -> str:
    """Where a worker was, by what `make_part` noted last."""
    first, first_line, last, last_line = numbers
    if not first:
        return f"at the beginning of {unit}"
    begin = unit.slices[first - 1].file.path
    if not last:
        return f"reading {begin}" + f" after line {first_line}" * bool(first_line)
    end = f"{unit.slices[last - 1].file.path}:{last_line}"
    return (
        f"at {end}" if f"{begin}:{first_line}" == end else f"between {begin}:{first_line} and {end}"
    )


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
        DataError: an input is damaged, the tokenizer gives impossible ids, or the disk is full.
    """
    final = part_path(Path(settings.folder), unit.index)
    staged = unique_sibling(final)
    writer = _PartWriter(unit, settings, encoder, note=note)
    try:
        with staged.open("wb") as stream:
            writer.write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {final}: {error.strerror}; free some space and run the same command "
            f"again"
        ) from error
    finally:
        staged.unlink(missing_ok=True)
    return writer.record()


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
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._splits: list[int] = []
        self._keys = array("Q")
        self._files: list[FileRecord] = []
        self._bad: list[BadDocument] = []

    def write(self, stream: BinaryIO) -> None:
        for group in self._groups():
            ids, lengths = self._encoder.encode_flat(group)
            self._check_ids(ids)
            self._lengths.append(lengths + 1)
            self._put(stream, self._with_eos(ids, lengths))
        for lengths in self._lengths:
            self._put(stream, lengths.astype("<i8"))
        self._put(stream, np.array(self._splits, dtype=np.uint8))
        self._put(stream, np.array(self._keys, dtype="<u8"))

    def record(self) -> PartRecord:
        return PartRecord(
            unit=self._unit.index,
            documents=len(self._splits),
            tokens=sum(int(lengths.sum()) for lengths in self._lengths),
            text_bytes=self._text_bytes,
            bytes=self._bytes,
            xxh3=self._hash.hexdigest(),
            files=tuple(self._files),
            bad=tuple(self._bad),
        )

    def _put(self, stream: BinaryIO, values: npt.NDArray[Any]) -> None:
        data = values.data
        stream.write(data)
        self._hash.update(data)
        self._bytes += values.nbytes

    def _with_eos(
        self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.unsignedinteger]:
        """The part's ids of a group: the texts' own, each text's end marked."""
        is_eos = np.zeros(ids.size + lengths.size, dtype=np.bool_)
        is_eos[np.cumsum(lengths + 1) - 1] = True
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

    def _groups(self) -> Iterator[list[str]]:
        group: list[str] = []
        characters = 0
        first = last = (0, 0)
        for document in self._documents():
            full = len(group) >= self._settings.batch_documents
            if group and (full or characters + len(document.text) > _GROUP_CHARACTERS):
                self._note(*first, *last)
                yield group
                self._note(*last, 0, 0)
                group, characters = [], 0
            last = (self._slice, document.line)
            first = first if group else last
            group.append(document.text)
            characters += len(document.text)
        if group:
            self._note(*first, *last)
            yield group

    def _documents(self) -> Iterator[Document]:
        for number, piece in enumerate(self._unit.slices, 1):
            self._slice = number
            self._note(number, 0, 0, 0)
            documents = 0
            for document in read_documents(piece.file, self._settings.text_field):
                if isinstance(document, BadDocument):
                    self._bad.append(document)
                    continue
                text = document.text.encode()
                self._splits.append(
                    0 if is_training_document(text, self._settings.train_split) else 1
                )
                self._text_bytes += len(text)
                if self._settings.deduplicate:
                    self._keys.extend((*hash_text(text), len(text)))
                documents += 1
                yield document
            self._files.append(_describe(piece.file, documents))


def _describe(file: InputFile, documents: int) -> FileRecord:
    path = Path(file.path)
    if path.stat().st_size != file.bytes:
        raise DataError(
            f"{path} changed while it was read; let it rest, and run again with --overwrite"
        )
    return FileRecord(file.name, file.bytes, quick_hash(path), documents)


@dataclass(frozen=True)
class Part:
    """A part read back: `ids` (tokens,) mapped, `lengths` and `splits` (documents,)."""

    ids: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    splits: npt.NDArray[np.uint8]


def read_keys(folder: Path, record: PartRecord) -> npt.NDArray[np.uint64]:
    """What the part of a journal line says of its texts, (documents, 3): the halves of their
    hashes, and their bytes.
    """
    with part_path(folder, record.unit).open("rb") as stream:
        stream.seek(record.bytes - record.documents * _KEY_BYTES)
        data = stream.read()
    return np.frombuffer(data, dtype="<u8").reshape(-1, 3)


def read_part(folder: Path, record: PartRecord, *, dtype: str) -> Part:
    """The part of a journal line.

    Raises:
        DataError: the file is not the one that was journalled.
    """
    path = part_path(folder, record.unit)
    if not path.is_file() or quick_hash(path) != record.xxh3:
        raise DataError(
            f"{path} changed since it was written; start over with --overwrite, and check the disk"
        )
    if record.documents == 0:
        empty = np.zeros(0, dtype=np.uint8)
        return Part(empty.astype(dtype), empty.astype(np.int64), empty)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    ids_end = record.tokens * np.dtype(dtype).itemsize
    lengths_end = ids_end + 8 * record.documents
    return Part(
        ids=data[:ids_end].view(np.dtype(dtype).newbyteorder("<")),
        # A copy, since the lengths need not begin at a multiple of eight.
        lengths=np.frombuffer(data[ids_end:lengths_end].tobytes(), dtype="<i8"),
        splits=np.asarray(data[lengths_end : lengths_end + record.documents]),
    )
