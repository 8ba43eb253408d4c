"""index.npy: every shard and record batch of a data set; index_file.py maps it.

One array of little-endian uint64 in NumPy's file format. For each split a table of its shards and
one of its batches follow each other, each column by column; manifest.json says how many rows:

    shards   (9, shards + 1)   first_batch, bytes, xxh3, sha256 (4 numbers), hashed, check
    batches  (7, batches + 1)  first_token, first_document, offsets_at, values_at, doc_ids_at, xxh3,
                               check

The row after the last holds the ends, so that a row and the next give counts. `first_token` and
`first_document` count from the beginning of the split. `check` is the xxh3 of all numbers of its
row and of what the next begins with, seeded by the data set's fingerprint, the split and the row's
number: whatever row is used is known to be whole and in its place, and 10 trillion tokens (1.2
million batches, 68 MB) are opened by reading a few pages.
Shards are named by their split and number.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, TypeVar, overload

import numpy as np
import numpy.typing as npt
import xxhash

from mamba_dist.errors import DataError

INDEX_NAME = "index.npy"
SPLITS = ("train", "val")
Numbers = npt.NDArray[np.uint64]
Record = TypeVar("Record")
SHARD_COLUMNS: Final = 9
BATCH_COLUMNS: Final = 7


@dataclass(frozen=True)
class BatchRecord:
    """One record batch of a shard; the offsets are bytes from the beginning of the file.

    `xxh3` covers the bytes from the end of the batch before (the file's beginning for the first) to
    the end of this one's last buffer. None: written before such hashes were kept.
    """

    documents: int
    tokens: int
    offsets_at: int
    values_at: int
    doc_ids_at: int
    xxh3: str | None = None


@dataclass(frozen=True)
class ShardRecord:
    """One Arrow file."""

    split: str
    file: str
    bytes: int
    documents: int
    tokens: int
    xxh3: str
    sha256: str
    batches: Sequence[BatchRecord]


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard of a number, from 0."""
    return f"{split}-{number:05d}.arrow"


class _Rows(Sequence[Record]):
    """Records made when they are asked for; equal to any sequence of equal records."""

    def row(self, number: int) -> Record:
        """The record of a row that exists."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> Record: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Record]: ...

    def __getitem__(self, number: int | slice) -> Record | Sequence[Record]:
        rows = range(len(self))[number]
        return self.row(rows) if isinstance(rows, int) else tuple(self.row(row) for row in rows)

    def __iter__(self) -> Iterator[Record]:
        return (self.row(number) for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class SplitTable(_Rows[ShardRecord]):
    """The shards of one split in reading order, and its batches by number.

    `fingerprint` is that of the data set whose checks the rows bear, None for rows that are in no
    file yet.
    """

    def __init__(
        self,
        split: str,
        shards: Numbers,
        batches: Numbers,
        *,
        fingerprint: str | None = None,
        name: str = "a new index",
    ) -> None:
        self.split = split
        self._name = name
        self._salt = _salt(fingerprint, split)
        self._shards: list[memoryview] = [column.data for column in shards]
        self._batches: list[memoryview] = [column.data for column in batches]

    def __len__(self) -> int:
        return len(self._shards[0]) - 1

    @property
    def token_begins(self) -> memoryview:
        """(batches + 1,) where in the split each batch begins, in tokens, and the end."""
        return self._batches[0]

    @property
    def document_begins(self) -> memoryview:
        """(batches + 1,) where in the split each batch begins, in documents, and the end."""
        return self._batches[1]

    @property
    def batches(self) -> int:
        """Record batches of the split."""
        return len(self._batches[0]) - 1

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return int(self.token_begins[-1])

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return int(self.document_begins[-1])

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(self._shards[1])

    def file_bytes(self, shard: int) -> int:
        """The size of a shard by its number, not known to be undamaged as its record is."""
        return int(self._shards[1][shard])

    def batch_at(self, token: int) -> int:
        """The number of the batch that holds a token of the split.

        Raises:
            DataError: the index is damaged where it was searched.
        """
        return self._search(self.token_begins, token)

    def find_batch(self, batch: int) -> tuple[int, int]:
        """The number of the shard of a batch, and the batch's place in it.

        Raises:
            DataError: the index is damaged there.
        """
        shard = self._search(self._shards[0], batch)
        first, _ = self._batch_range(shard)
        return shard, batch - first

    def _search(self, begins: memoryview, sought: int) -> int:
        number = bisect_right(begins, sought) - 1
        if not 0 <= number < len(begins) - 1:
            raise self._damaged(f"where {sought:,} was searched among {begins[-1]:,}")
        return number

    def row(self, number: int) -> ShardRecord:
        """The record of a shard.

        Raises:
            DataError: its row is damaged.
        """
        first, end = self._batch_range(number)
        hashed = bool(self._shards[7][number])
        return ShardRecord(
            split=self.split,
            file=shard_name(self.split, number),
            bytes=self._shards[1][number],
            documents=self.document_begins[end] - self.document_begins[first],
            tokens=self.token_begins[end] - self.token_begins[first],
            xxh3=f"{self._shards[2][number]:016x}",
            sha256="".join(f"{self._shards[part][number]:016x}" for part in range(3, 7)),
            batches=_ShardBatches(self, first, end - first, hashed=hashed),
        )

    def batch(self, number: int, *, hashed: bool) -> BatchRecord:
        """The record of a batch, counted over the split; not `hashed`: its xxh3 is not known.

        Raises:
            DataError: its row is damaged.
        """
        row = self._whole(self._batches, number, (0, 1))
        token, document, offsets_at, values_at, doc_ids_at, xxh3, next_token, next_document = row
        return BatchRecord(
            documents=next_document - document,
            tokens=next_token - token,
            offsets_at=offsets_at,
            values_at=values_at,
            doc_ids_at=doc_ids_at,
            xxh3=f"{xxh3:016x}" if hashed else None,
        )

    def _batch_range(self, shard: int) -> tuple[int, int]:
        row = self._whole(self._shards, shard, (0,))
        return row[0], row[-1]

    def _whole(
        self, columns: Sequence[memoryview], number: int, begins: tuple[int, ...]
    ) -> list[int]:
        row = [column[number] for column in columns[:-1]]
        row += [columns[begin][number + 1] for begin in begins]
        check = xxhash.xxh3_64_intdigest(
            struct.pack(f"<{len(row)}Q", *row), seed=self._salt ^ number
        )
        if check != columns[-1][number]:
            kind = "batch" if columns is self._batches else "shard"
            raise self._damaged(f"in the row of {kind} {number}")
        return row

    def sealed(self, fingerprint: str) -> list[memoryview]:
        """All columns, with the checks of the data set of that fingerprint.

        Raises:
            DataError: a row is damaged.
        """
        for columns, begins in ((self._shards, (0,)), (self._batches, (0, 1))):
            for number in range(len(columns[0]) - 1):
                self._whole(columns, number, begins)
        shards, batches = (
            np.stack([np.asarray(column) for column in columns[:-1]])
            for columns in (self._shards, self._batches)
        )
        sealed = new_table(self.split, shards, batches, fingerprint=fingerprint)
        return [*sealed._shards, *sealed._batches]

    def _damaged(self, where: str) -> DataError:
        return DataError(
            f"{self._name} is damaged in the split {self.split} {where}, or it is of another data "
            "set; restore it or tokenize again with --overwrite"
        )


class _ShardBatches(_Rows[BatchRecord]):
    """The batches of one shard."""

    def __init__(self, table: SplitTable, first: int, count: int, *, hashed: bool) -> None:
        self._table, self._first, self._count, self._hashed = table, first, count, hashed

    def __len__(self) -> int:
        return self._count

    def row(self, number: int) -> BatchRecord:
        return self._table.batch(self._first + number, hashed=self._hashed)


class ShardIndex(_Rows[ShardRecord]):
    """All shards of a data set, split by split.

    `sha256` is that of the file, None for an index that was not read from one. With
    `known_fingerprint` the manifest vouches for a data set of the meaning that comes with it, so
    that it need not be computed from all shards.
    """

    def __init__(self, tables: Iterable[SplitTable], *, sha256: str | None = None) -> None:
        self._tables = {table.split: table for table in tables}
        self.sha256 = sha256
        self.known_fingerprint: tuple[list[object], str] | None = None

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables.values())

    def split(self, split: str) -> SplitTable:
        """The table of a split."""
        return self._tables[split]

    def row(self, number: int) -> ShardRecord:
        for table in self._tables.values():
            if number < len(table):
                return table.row(number)
            number -= len(table)
        raise IndexError(number)


def index_of(shards: Sequence[ShardRecord]) -> ShardIndex:
    """The index of shards that are listed split by split and named by number.

    Raises:
        ValueError: they are not, the batches of one do not add up to it, or a number does not fit.
    """
    if isinstance(shards, ShardIndex):
        return shards
    names = [
        shard_name(split, number)
        for split in SPLITS
        for number in range(sum(shard.split == split for shard in shards))
    ]
    for shard, name in zip(shards, names, strict=True):
        if shard.file != name:
            raise ValueError(f"shard {shard.file!r} of split {shard.split!r}, expected {name}")
        numbers = chain([shard.bytes], *map(_numbers, shard.batches))
        # Said here, since numpy wraps such numbers round before version 2.
        if not all(0 <= number < 2**64 for number in numbers):
            raise ValueError(f"a number of {name} is negative or of more than 64 bits")
        for count in ("documents", "tokens"):
            if sum(getattr(batch, count) for batch in shard.batches) != getattr(shard, count):
                raise ValueError(
                    f"the batches of {name} do not add up to {getattr(shard, count)} {count}"
                )
    return ShardIndex(
        _table_of(split, [shard for shard in shards if shard.split == split]) for split in SPLITS
    )


def _numbers(batch: BatchRecord) -> list[int]:
    places = [batch.offsets_at, batch.values_at, batch.doc_ids_at]
    return [batch.documents, batch.tokens, *places]


def _table_of(split: str, shards: Sequence[ShardRecord]) -> SplitTable:
    batches = list(chain.from_iterable(shard.batches for shard in shards))
    in_shards = np.zeros((SHARD_COLUMNS - 1, len(shards) + 1), dtype="<u8")
    in_shards[0, 1:] = np.cumsum([len(shard.batches) for shard in shards], dtype=np.uint64)
    for number, shard in enumerate(shards):
        sha256 = [int(shard.sha256[at : at + 16], 16) for at in range(0, 64, 16)]
        hashed = all(batch.xxh3 is not None for batch in shard.batches)
        in_shards[1:, number] = [shard.bytes, int(shard.xxh3, 16), *sha256, hashed]
    in_batches = np.zeros((BATCH_COLUMNS - 1, len(batches) + 1), dtype="<u8")
    in_batches[0, 1:] = np.cumsum([batch.tokens for batch in batches], dtype=np.uint64)
    in_batches[1, 1:] = np.cumsum([batch.documents for batch in batches], dtype=np.uint64)
    for number, batch in enumerate(batches):
        xxh3 = int(batch.xxh3 or "0", 16)
        in_batches[2:, number] = [*_numbers(batch)[2:], xxh3]
    return new_table(split, in_shards, in_batches)


def new_table(
    split: str, shards: Numbers, batches: Numbers, *, fingerprint: str | None = None
) -> SplitTable:
    """The table of a split from the columns of its shards (8, shards + 1) and batches
    (6, batches + 1) uint64, that is, all but their checks.
    """
    salt = _salt(fingerprint, split)
    return SplitTable(
        split,
        _with_checks(shards, (0,), salt=salt),
        _with_checks(batches, (0, 1), salt=salt),
        fingerprint=fingerprint,
    )


def _with_checks(columns: Numbers, begins: tuple[int, ...], *, salt: int) -> Numbers:
    """A table with its last column; `begins` are the columns of which a row needs the next too."""
    following = np.roll(columns[list(begins)], -1, axis=1)
    rows = np.ascontiguousarray(np.vstack([columns, following]).T)
    checks = [xxhash.xxh3_64_intdigest(row, seed=salt ^ number) for number, row in enumerate(rows)]
    return np.vstack([columns, np.array(checks, dtype="<u8")])


def _salt(fingerprint: str | None, split: str) -> int:
    return 0 if fingerprint is None else xxhash.xxh3_64_intdigest(f"{fingerprint} {split}".encode())
