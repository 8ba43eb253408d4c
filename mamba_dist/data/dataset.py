"""A data set folder opened for reading: its manifest, and each split as one long stream of tokens.

Opening reads the manifest and the sizes of some shards, a few pages in all; the index and each
shard are mapped, and looked at where something is read.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mamba_dist.data.manifest import Manifest, read_manifest
from mamba_dist.data.shard import SplitReaders, check_size
from mamba_dist.data.shard_index import SPLITS, SplitTable, shard_name
from mamba_dist.errors import DataError

# A page of the index each, if the data set is very large.
_SIZES_AT_OPEN = 100


class TokenStream:
    """All documents of one split end to end, in shard order."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self._batches = SplitReaders(folder, manifest, split)
        # begins[i] is the position of the first token of batch i; the last entry is the end.
        self._table = manifest.shards_of(split)
        self._begins = self._table.token_begins
        self._vocab_size = manifest.tokenizer.vocab_size
        self.tokens = manifest.tokens(split)

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens start..stop-1 as (ids (n,) int64, begins (n,) bool: whether a document begins
        there).

        Raises:
            DataError: a shard is missing or damaged.
        """
        ids = np.empty(stop - start, dtype=np.int64)
        begins = np.zeros(stop - start, dtype=np.bool_)
        batch = self._table.batch_at(start) if start < stop else 0
        filled = 0
        while filled < len(ids):
            shard, index = self._batches[batch]
            begin = self._begins[batch]
            first, last = start + filled - begin, min(stop, self._begins[batch + 1]) - begin
            ids[filled : filled + last - first] = shard.tokens(index)[first:last]
            offsets = shard.offsets(index)
            low, high = np.searchsorted(offsets, [first, last])
            begins[offsets[low:high] - first + filled] = True
            filled += last - first
            batch += 1
        self._check_ids(ids, start)
        return ids, begins

    def _check_ids(self, ids: npt.NDArray[np.int64], start: int) -> None:
        if ids.size and int(ids.max()) >= self._vocab_size:
            at = start + int(ids.argmax())
            batch = self._table.batch_at(at)
            raise DataError(
                f"shard {self._batches[batch][0].path} holds id {int(ids.max())}, outside the "
                f"vocabulary of {self._vocab_size}: the file is damaged; restore it or tokenize "
                "again with --overwrite"
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
        _check_some_sizes(folder, manifest.shards_of(split))
    return TokenDataset(folder, manifest)


def _check_some_sizes(folder: Path, table: SplitTable) -> None:
    for number in range(0, len(table), -(-len(table) // _SIZES_AT_OPEN)):
        path = folder / shard_name(table.split, number)
        # The whole record, which touches more of the index, is only for saying what is wrong.
        if not path.is_file() or path.stat().st_size != table.file_bytes(number):
            check_size(path, table[number])
