"""What a split of a data set holds, counted batch by batch over memory maps.

Exact and in bounded memory: the counts of ids have the vocabulary's size, and there are at most
√(2·tokens) different document lengths, since k different ones add up to k(k+1)/2 or more.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mamba_dist.data.manifest import Manifest
from mamba_dist.data.shard import ShardReader
from mamba_dist.errors import DataError

Counts = npt.NDArray[np.int64]
_TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class SplitStatistics:
    """Counts of one split.

    `id_counts` (vocab_size,) occurrences of each id; `lengths` and `length_counts` the different
    document lengths in tokens, EOS included, rising, and how many documents have each.
    """

    documents: int
    tokens: int
    id_counts: Counts
    lengths: Counts
    length_counts: Counts

    @property
    def mean_length(self) -> float:
        """Tokens per document."""
        return self.tokens / self.documents

    def length_quantile(self, share: float) -> int:
        """The least length that at least this share (0 to 1) of the documents does not exceed."""
        below = np.cumsum(self.length_counts)
        return int(self.lengths[np.searchsorted(below, share * self.documents)])

    def most_frequent(self, count: int) -> list[tuple[int, int]]:
        """(id, occurrences) of the ids seen most, the most frequent first, equals by id."""
        order = np.argsort(-self.id_counts, kind="stable")[:count]
        return [(int(i), int(self.id_counts[i])) for i in order if self.id_counts[i]]

    def length_histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, documents) of ranges of length that double, without empty ends."""
        exponents = np.floor(np.log2(self.lengths)).astype(np.int64)
        counts = np.bincount(exponents, weights=self.length_counts)
        first = int(exponents[0])
        return [(2**e, 2 ** (e + 1), int(counts[e])) for e in range(first, len(counts))]


def split_statistics(
    folder: Path, manifest: Manifest, split: str, *, advance: Callable[[int], None]
) -> SplitStatistics:
    """The statistics of a split; `advance` hears of tokens as they are counted.

    Raises:
        DataError: a shard is missing or damaged.
    """
    vocab_size = manifest.tokenizer.vocab_size
    id_counts = np.zeros(vocab_size, dtype=np.int64)
    lengths = length_counts = np.zeros(0, dtype=np.int64)
    for shard, index in split_batches(folder, manifest, split):
        offsets = shard.offsets(index)
        found, counts = np.unique(np.diff(offsets), return_counts=True)
        lengths, length_counts = _merge(lengths, length_counts, found, counts)
        tokens = shard.tokens(index)
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            piece = tokens[start : start + _TOKENS_AT_ONCE]
            if int(piece.max()) >= vocab_size or int(lengths[0]) < 1:
                raise DataError(
                    f"shard {shard.path} is damaged: it holds id {piece.max()} of {vocab_size}, or "
                    f"a document of {lengths[0]} tokens; see `python tools/verify_shards.py "
                    f"{folder}`"
                )
            id_counts += np.bincount(piece, minlength=vocab_size)
            advance(len(piece))
    return SplitStatistics(
        documents=int(length_counts.sum()),
        tokens=int(id_counts.sum()),
        id_counts=id_counts,
        lengths=lengths,
        length_counts=length_counts,
    )


def sample_documents(manifest: Manifest, split: str, count: int, *, seed: int) -> list[int]:
    """Numbers of up to `count` documents of a split, from 0 in reading order, drawn by the seed."""
    total = manifest.documents(split)
    return sorted(random.Random(seed).sample(range(total), min(count, total)))


def split_batches(
    folder: Path, manifest: Manifest, split: str
) -> Iterator[tuple[ShardReader, int]]:
    """The record batches of a split in order, as (shard, index), for reading from end to end."""
    for record in manifest.shards_of(split):
        # One reader at a time: its map, and the memory behind it, goes when the next one comes.
        shard = ShardReader(folder / record.file, record, manifest, sequential=True)
        for index in range(len(record.batches)):
            yield shard, index


def _merge(
    lengths: Counts, counts: Counts, more: npt.NDArray[np.int64], more_counts: npt.NDArray[np.int64]
) -> tuple[Counts, Counts]:
    merged, places = np.unique(np.concatenate([lengths, more]), return_inverse=True)
    total = np.zeros(len(merged), dtype=np.int64)
    np.add.at(total, places, np.concatenate([counts, more_counts]))
    return merged, total
