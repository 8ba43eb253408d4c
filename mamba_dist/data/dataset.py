"""A data set folder opened for reading: its manifest, and each split as one long stream of tokens.

Opening reads the manifest and the sizes of the shards; a shard is mapped when first read.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mamba_dist.data.manifest import SPLITS, Manifest, read_manifest
from mamba_dist.data.shard import ShardReader, check_size
from mamba_dist.errors import DataError


class TokenStream:
    """All documents of one split end to end, in shard order."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        records = manifest.shards_of(split)
        shards = [ShardReader(folder / record.file, record, manifest) for record in records]
        self._batches = [
            (shard, index) for shard in shards for index in range(len(shard.record.batches))
        ]
        lengths = [batch.tokens for record in records for batch in record.batches]
        # begins[i] is the position of the first token of batch i; the last entry is the end.
        self._begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._vocab_size = manifest.tokenizer.vocab_size
        self.tokens = int(self._begins[-1])

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens start..stop-1 as (ids (n,) int64, begins (n,) bool: whether a document begins
        there).

        Raises:
            DataError: a shard is missing or damaged.
        """
        ids = np.empty(stop - start, dtype=np.int64)
        begins = np.zeros(stop - start, dtype=np.bool_)
        batch = int(np.searchsorted(self._begins, start, side="right")) - 1
        filled = 0
        while filled < len(ids):
            shard, index = self._batches[batch]
            first = start + filled - int(self._begins[batch])
            last = min(stop, int(self._begins[batch + 1])) - int(self._begins[batch])
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
            batch = int(np.searchsorted(self._begins, at, side="right")) - 1
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

    Raises:
        DataError: there is none, its manifest is damaged, or a shard is missing or of another size.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        check_size(folder / shard.file, shard)
    for split in SPLITS:
        if manifest.tokens(split) == 0:
            raise DataError(f"{folder} has no {split} documents; tokenize a larger corpus")
    return TokenDataset(folder, manifest)
