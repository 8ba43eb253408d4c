"""A data set folder opened for reading: its manifest, and each split as one long stream of tokens.

Opening reads the manifest and the sizes of some shards, a few pages in all; the index and each
shard are mapped, and looked at where something is read.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mamba_dist.data.manifest import Manifest, read_manifest
from mamba_dist.data.shard import SplitReaders, check_size
from mamba_dist.data.shard_index import SPLITS, SplitTable, shard_name
from mamba_dist.errors import DataError

# A page of the index each, if the data set is very large.
_SIZES_AT_OPEN: Final = 100
# Named here, since looking them up in numpy at each window takes a tenth of its time.
_INT64: Final = np.dtype(np.int64)
_BOOL: Final = np.dtype(np.bool_)
# About 700 bytes each, so that a data set of any size costs a process 10 MB.
_KEPT_PLACES: Final = 16384


class _Place(NamedTuple):
    """One record batch in the stream: positions `begin` to `end`, its ids, and where in it each
    document begins (and its end), as Python reads single numbers fastest.
    """

    begin: int
    end: int
    tokens: npt.NDArray[Any]
    offsets: memoryview


class TokenStream:
    """All documents of one split end to end, in shard order."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self._places: dict[int, _Place] = {}
        self._batches = SplitReaders(folder, manifest, split, views=self._places)
        # begins[i] is the position of the first token of batch i; the last entry is the end.
        self._table = manifest.shards_of(split)
        self._begins = self._table.token_begins
        # Of all batches but the last, which are nearly equal.
        last = self._table.batches - 1
        self._batch_tokens = max(1, self._begins[last] // max(1, last))
        self._vocab_size = manifest.tokenizer.vocab_size
        self.tokens = manifest.tokens(split)

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens start..stop-1 as (ids (n,) int64, begins (n,) bool: whether a document begins
        there).

        Raises:
            DataError: a shard is missing or damaged.
        """
        if start == stop:
            return np.empty(0, _INT64), np.empty(0, _BOOL)
        # A guess first, since it is right nearly always and a search takes 0.2 us more.
        guessed = self._places.get(start // self._batch_tokens)
        begin, end, tokens, offsets = guessed or self._place(start)
        if not begin <= start < end:
            begin, end, tokens, offsets = self._place(start)
        if stop > end:
            return self._read_across(start, stop)
        # Measured for windows of 2,049 tokens: argmax takes 0.3 us where max takes 1 to 2, and
        # single steps on Python's numbers a third of numpy's calls, since documents are few.
        first, count = start - begin, stop - start
        stored = tokens[first : first + count]
        if (largest := stored.item(stored.argmax())) >= self._vocab_size:
            raise self._wrong_id(start, largest)
        begins = np.zeros(count, _BOOL)
        try:
            document = bisect_left(offsets, first)
            while (at := offsets[document] - first) < count:
                begins[at] = True
                document += 1
        except IndexError as error:
            raise DataError(
                f"shard {self._path_at(start)} has a damaged document index; restore it or "
                "tokenize again with --overwrite"
            ) from error
        return stored.astype(_INT64), begins

    def _read_across(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The same over the ends of batches."""
        ids = np.empty(stop - start, dtype=np.int64)
        begins = np.empty(stop - start, dtype=np.bool_)
        at = start
        while at < stop:
            end = min(stop, self._begins[self._table.batch_at(at) + 1])
            ids[at - start : end - start], begins[at - start : end - start] = self.read(at, end)
            at = end
        return ids, begins

    def _place(self, start: int) -> _Place:
        """Where a position lies, kept for the next one there."""
        batch = self._table.batch_at(start)
        if (known := self._places.get(batch)) is not None:
            return known
        shard, index = self._batches[batch]
        if len(self._places) >= _KEPT_PLACES:
            self._places.clear()
        self._places[batch] = place = _Place(
            self._begins[batch],
            self._begins[batch + 1],
            shard.tokens(index),
            shard.offsets(index).data,
        )
        return place

    def _path_at(self, start: int) -> Path:
        return self._batches[self._table.batch_at(start)][0].path

    def _wrong_id(self, start: int, found: int) -> DataError:
        return DataError(
            f"shard {self._path_at(start)} holds id {found}, outside the vocabulary of "
            f"{self._vocab_size}: the file is damaged; restore it or tokenize again with "
            "--overwrite"
        )


@dataclass(frozen=True)
class TokenDataset:
    """An open data set."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Differs if any token, its order, its split or its meaning differs."""
        return self.manifest.fingerprint

    @cached_property
    def train(self) -> TokenStream:
        """The training split."""
        return TokenStream(self.path, self.manifest, "train")

    @cached_property
    def val(self) -> TokenStream:
        """The validation split."""
        return TokenStream(self.path, self.manifest, "val")


def open_dataset(path: Path | str) -> TokenDataset:
    """The data set in a folder.

    Of more than 100 shards of a split, about so many are looked for here, spread over all, and the
    others when they are read.

    Raises:
        DataError: there is none, its manifest is damaged, or a shard is missing or of another size.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for split in SPLITS:
        if manifest.tokens(split) == 0:
            raise DataError(f"{folder} has no {split} documents; tokenize a larger corpus")
        table = manifest.shards_of(split)
        _check_sizes(folder, table, every=-(-len(table) // _SIZES_AT_OPEN))
    return TokenDataset(folder, manifest)


def check_sizes(folder: Path) -> None:
    """Nothing, if a data set can be opened and all its shards are as long as they should be.

    Raises:
        DataError: as for `open_dataset`.
    """
    manifest = open_dataset(folder).manifest
    for split in SPLITS:
        _check_sizes(folder, manifest.shards_of(split), every=1)


def _check_sizes(folder: Path, table: SplitTable, *, every: int) -> None:
    for number in range(0, len(table), every):
        path = folder / shard_name(table.split, number)
        # The whole record, which touches more of the index, is only for saying what is wrong.
        if not path.is_file() or path.stat().st_size != table.file_bytes(number):
            check_size(path, table[number])
