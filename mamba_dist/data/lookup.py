"""From a number to documents: by doc_id, by place in a split, and the input file each came from.

Of the shards only the pages that the search touches are read, O(log batches) of a split for a
doc_id; inputs.jsonl, one line an input file, is read whole.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mamba_dist.data.manifest import INPUTS_NAME, Manifest
from mamba_dist.data.shard import ShardReader, SplitReaders
from mamba_dist.data.shard_index import SPLITS
from mamba_dist.errors import DataError


@dataclass(frozen=True)
class DocumentPlace:
    """Where a document lies. `position` counts tokens from the beginning of its split, and
    `shard_position` from that of its shard; `row` is its row in the record batch."""

    doc_id: int
    split: str
    shard: str
    batch: int
    row: int
    tokens: int
    position: int
    shard_position: int


@dataclass(frozen=True)
class InputPlace:
    """The input file of a document, and its number among the good documents of that file, from 0.

    `documents` is how many the file gave.
    """

    name: str
    number: int
    documents: int


class SplitIndex:
    """The documents of one split by place and number, in reading order."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.split = split
        self._vocab_size = manifest.tokenizer.vocab_size
        self._readers = SplitReaders(folder, manifest, split)
        self._table = manifest.shards_of(split)
        self._first_documents = self._table.document_begins
        self._begins = self._table.token_begins

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return self._table.tokens

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return self._table.documents

    def nth(self, number: int) -> DocumentPlace:
        """The document of a number, from 0 in reading order.

        Raises:
            DataError: a shard is missing or damaged.
        """
        batch = bisect_right(self._first_documents, number) - 1
        return self._place(batch, number - self._first_documents[batch])

    def between(self, start: int, stop: int) -> Iterator[DocumentPlace]:
        """The documents that tokens start..stop-1 of the split belong to, in order.

        Raises:
            DataError: the split is shorter, or a shard is missing or damaged.
        """
        if not 0 <= start < stop <= self.tokens:
            raise DataError(
                f"tokens {start} to {stop - 1} do not lie in the {self.split} split, which has "
                f"{self.tokens}, from 0"
            )
        while start < stop:
            batch = self._table.batch_at(start)
            shard, index = self._readers[batch]
            within = start - self._begins[batch]
            row = int(np.searchsorted(shard.offsets(index), within, side="right")) - 1
            place = self._place(batch, row)
            end = place.position + place.tokens
            if not place.position <= start < end:
                raise _damaged(shard, f"its batch {index} has offsets that do not rise")
            yield place
            start = end

    def find(self, doc_id: int) -> DocumentPlace | None:
        """The document of a doc_id, None if the split does not hold it.

        Raises:
            DataError: a shard is missing or damaged.
        """
        low, high = 0, len(self._readers)
        while low < high:
            middle = (low + high) // 2
            shard, index = self._readers[middle]
            if int(shard.doc_ids(index)[0]) <= doc_id:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return None
        shard, index = self._readers[low - 1]
        doc_ids = shard.doc_ids(index)
        row = int(np.searchsorted(doc_ids, np.uint64(doc_id)))
        if row == len(doc_ids) or int(doc_ids[row]) != doc_id:
            return None
        return self._place(low - 1, row)

    def read(self, place: DocumentPlace, *, most: int) -> npt.NDArray[Any]:
        """The first ids of a document, at most so many.

        Raises:
            DataError: a shard is missing or damaged.
        """
        batch = self._table.batch_at(place.position)
        shard, index = self._readers[batch]
        first = place.position - self._begins[batch]
        ids = shard.tokens(index)[first : first + min(most, place.tokens)]
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise _damaged(
                shard, f"it holds id {ids.max()}, outside the vocabulary of {self._vocab_size}"
            )
        return ids

    def _place(self, batch: int, row: int) -> DocumentPlace:
        shard, index = self._readers[batch]
        begin, end = map(int, shard.offsets(index)[row : row + 2])
        if not 0 <= begin < end <= shard.record.batches[index].tokens:
            raise _damaged(shard, f"row {row} of its batch {index} lies at tokens {begin} to {end}")
        position = self._begins[batch] + begin
        return DocumentPlace(
            doc_id=int(shard.doc_ids(index)[row]),
            split=self.split,
            shard=shard.record.file,
            batch=index,
            row=row,
            tokens=end - begin,
            position=position,
            shard_position=position - self._begins[batch - index],
        )


def _damaged(shard: ShardReader, fault: str) -> DataError:
    return DataError(
        f"shard {shard.path} is damaged: {fault}; see `python tools/verify_shards.py "
        f"{shard.path.parent}`"
    )


def find_document(folder: Path, manifest: Manifest, doc_id: int) -> DocumentPlace:
    """The document of a doc_id, in whichever split.

    Raises:
        DataError: there is none, or a shard is missing or damaged.
    """
    for split in SPLITS:
        if (place := SplitIndex(folder, manifest, split).find(doc_id)) is not None:
            return place
    raise DataError(
        f"{folder} holds no document {doc_id}; its doc_ids go from 0 to "
        f"{manifest.inputs.documents - 1}"
        + ", without those of duplicates"
        * (manifest.duplicates is not None)
    )


class InputIndex:
    """The input files of a data set by the doc_ids they gave."""

    def __init__(self, folder: Path) -> None:
        path = folder / INPUTS_NAME
        try:
            lines = path.read_bytes().splitlines()
            files = [json.loads(line) for line in lines]
            self._files = [
                (int(file["first_doc_id"]), str(file["name"]), int(file["documents"]))
                for file in files
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}: {error}); restore it, see "
                f"`python tools/verify_shards.py {folder}`"
            ) from error
        self._firsts = [first for first, _, _ in self._files]

    def find(self, doc_id: int) -> InputPlace:
        """The input file that a document came from.

        Raises:
            DataError: none of them gave it.
        """
        # Of files that begin at the same doc_id, all but the last gave nothing.
        index = bisect_right(self._firsts, doc_id) - 1
        if index >= 0:
            first, name, documents = self._files[index]
            if doc_id < first + documents:
                return InputPlace(name, doc_id - first, documents)
        raise DataError(f"{INPUTS_NAME} names no file that gave document {doc_id}; restore it")
