"""A part: what one unit became, and the journal line that vouches for it.

The unit's ids end to end (little-endian, EOS after each document), then one int64 length and one
uint8 split (0 train, 1 val) for each document; if duplicates are to go, then three uint64 for each:
both halves of its text's hash, and the text's bytes. The bad documents come last, a line of JSON
each. Its counts and hash stand in the journal.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mamba_dist.data.durable import quick_hash
from mamba_dist.data.preparation.sources import Unit
from mamba_dist.errors import ChangedPartError

_KEY_BYTES = 24
_BLOCK_DOCUMENTS = 1 << 16
_BLOCK_TOKENS = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """What one slice of an input file gave; `name`, `bytes` and `xxh3` are the file's, the slice is
    its bytes from `start_bytes` to before `stop_bytes`.

    `xxh3` stands with the file's first slice alone. `bad` of the unit's bad documents are this
    slice's, and `lines` is how many lines (rows) begin in it.
    """

    name: str
    bytes: int
    start_bytes: int
    stop_bytes: int
    xxh3: str | None
    documents: int
    lines: int
    bad: int


@dataclass(frozen=True)
class PartRecord:
    """A committed part; one journal line.

    `faults` counts the bad documents of each kind, whose lines take the part's last `bad_bytes`.
    `ids_xxh3` is of the note of the documents' ids, where they are kept.
    """

    unit: int
    documents: int
    tokens: int
    text_bytes: int
    bytes: int
    xxh3: str
    files: tuple[FileRecord, ...]
    faults: dict[str, int]
    bad_bytes: int
    ids_xxh3: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The journal line."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(line: dict[str, Any]) -> "PartRecord":
        """The record of a journal line."""
        files = tuple(FileRecord(**file) for file in line["files"])
        return PartRecord(**{**line, "files": files})

    def is_of(self, unit: Unit) -> bool:
        """Whether the part was made of this very unit."""
        made = [(file.name, file.bytes, file.start_bytes, file.stop_bytes) for file in self.files]
        wanted = [
            (piece.file.name, piece.file.bytes, piece.start_bytes, piece.stop_bytes)
            for piece in unit.slices
        ]
        return (self.unit, made) == (unit.index, wanted)


def part_path(folder: Path, unit: int) -> Path:
    """Where the part of a unit lies."""
    return folder / f"unit-{unit:08d}.part"


@dataclass(frozen=True)
class PartBlock:
    """Some documents of a part: `ids` (tokens,), `lengths` and `splits` (documents,)."""

    ids: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    splits: npt.NDArray[np.uint8]


def read_keys(folder: Path, record: PartRecord) -> npt.NDArray[np.uint64]:
    """What the part of a journal line says of its texts, (documents, 3): the halves of their
    hashes, and their bytes.
    """
    with part_path(folder, record.unit).open("rb") as stream:
        size = record.documents * _KEY_BYTES
        stream.seek(record.bytes - record.bad_bytes - size)
        data = stream.read(size)
    return np.frombuffer(data, dtype="<u8").reshape(-1, 3)


def read_part(folder: Path, record: PartRecord, *, dtype: str) -> Iterator[PartBlock]:
    """The part of a journal line, some megabytes at a time; a longer document is mapped, alone.

    Raises:
        ChangedPartError: the file is not the one that was journalled.
    """
    path = part_path(folder, record.unit)
    if not path.is_file() or quick_hash(path) != record.xxh3:
        raise ChangedPartError(path, record.unit)
    item = np.dtype(dtype).newbyteorder("<")
    lengths_at = record.tokens * item.itemsize
    splits_at = lengths_at + 8 * record.documents
    token = 0
    for document in range(0, record.documents, _BLOCK_DOCUMENTS):
        count = min(_BLOCK_DOCUMENTS, record.documents - document)
        lengths = np.fromfile(path, "<i8", count, offset=lengths_at + 8 * document)
        splits = np.fromfile(path, np.uint8, count, offset=splits_at + document)
        ends = np.cumsum(lengths)
        start = 0
        while start < count:
            begin = int(ends[start] - lengths[start])
            stop = max(start + 1, int(np.searchsorted(ends, begin + _BLOCK_TOKENS, side="right")))
            tokens = int(ends[stop - 1]) - begin
            at = (token + begin) * item.itemsize
            yield PartBlock(
                np.fromfile(path, item, tokens, offset=at)
                if tokens <= _BLOCK_TOKENS
                else np.memmap(path, item, "r", at, tokens),
                lengths[start:stop],
                splits[start:stop],
            )
            start = stop
        token += int(ends[-1])
