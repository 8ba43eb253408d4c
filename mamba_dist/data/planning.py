"""Planning which pieces of documents share a training sequence, offline, in bounded memory.

A document of n tokens has n - 1 predictions and takes as many positions: its last token, the EOS,
is a label and no input, since nothing of its own document follows it. A document with more
predictions than a sequence has positions is cut into whole sequences and a rest; the first token of
a piece is the last label of the piece before, so every label of the split comes once. `pad` gives
each piece a sequence of its own. `best_fit` packs them by best-fit-decreasing (Ding et al. 2024,
"Fewer Truncations Improve Language Modeling", arXiv 2404.10830), among GROUP_PIECES at a time as
they come in reading order.

The samples of a group stand in the order of their first tokens, and so do the pieces in a sample.
Only the shards' offsets are read, 8 bytes a document.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mamba_dist.config.schema import Packing
from mamba_dist.data.best_fit import best_fit_decreasing
from mamba_dist.data.manifest import Manifest
from mamba_dist.data.packing_plan import PlanTotals, new_plan, plan_key, plan_path
from mamba_dist.data.samples import count_windows
from mamba_dist.data.statistics import split_batches
from mamba_dist.errors import DataError

GROUP_PIECES = 1 << 20
"""Part of what a plan is a function of: to change it is to raise PLAN_FORMAT_VERSION."""

Ints = npt.NDArray[np.int64]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in reading order: `starts` (n,) in tokens of the split, `lengths` (n,) in
    positions."""

    starts: Ints
    lengths: Ints


@dataclass(frozen=True)
class SampleGroup:
    """Samples, as their spans one after another, and `counts` (samples,) of these in each."""

    spans: Pieces
    counts: Ints


def make_plan(
    folder: Path, manifest: Manifest, *, packing: Packing, length: int, advance: Advance
) -> PlanTotals:
    """Writes the plan of the training split for sequences of `length` positions beside its shards;
    `advance` hears of tokens as they are passed.

    Raises:
        DataError: a shard is missing or damaged, another process makes the same plan, or it cannot
            be written.
    """
    key = plan_key(manifest.fingerprint, packing, length)
    tally = _Tally(length)
    with new_plan(plan_path(folder, key)) as writer:
        for group in _sample_groups(folder, manifest, packing, tally, advance):
            writer.add(group.spans.starts, group.spans.lengths, group.counts)
        writer.finish(key, tally.totals())
    return tally.totals()


def packing_totals(
    folder: Path, manifest: Manifest, *, packing: Packing, length: int, advance: Advance
) -> PlanTotals:
    """What an epoch would come to in any mode; nothing is written.

    Raises:
        DataError: a shard is missing or damaged.
    """
    tally = _Tally(length)
    if packing == "concat":
        tally.samples = tally.spans = count_windows(
            manifest.tokens("train"), length, pad_tail=False
        )
        for starts, tokens in _documents(folder, manifest, advance):
            tally.count_windowed(starts, tokens)
    else:
        for _ in _sample_groups(folder, manifest, packing, tally, advance):
            pass
    return tally.totals()


class _Tally:
    """PlanTotals while they are counted."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.samples = self.spans = self._labels = self._documents = self._cut = 0

    def count_documents(self, tokens: Ints) -> None:
        self._documents += len(tokens)
        self._cut += int((tokens - 1 > self.length).sum())

    def count_samples(self, group: SampleGroup) -> None:
        self.samples += len(group.counts)
        self.spans += len(group.spans.starts)
        self._labels += int(group.spans.lengths.sum())

    def count_windowed(self, starts: Ints, tokens: Ints) -> None:
        """Counts documents where the stream of all of them is cut every `length` tokens."""
        ends = starts + tokens - 1  # of the positions that have a label
        self._documents += len(tokens)
        self._cut += int((starts // self.length < (ends - 1) // self.length).sum())
        total = self.samples * self.length
        self._labels += int((np.minimum(ends, total) - np.minimum(starts, total)).sum())

    def totals(self) -> PlanTotals:
        return PlanTotals(self.samples, self.spans, self._labels, self._documents, self._cut)


def _sample_groups(
    folder: Path, manifest: Manifest, packing: Packing, tally: _Tally, advance: Advance
) -> Iterator[SampleGroup]:
    def pieces() -> Iterator[Pieces]:
        for starts, tokens in _documents(folder, manifest, advance):
            tally.count_documents(tokens)
            yield cut_documents(starts, tokens, length=tally.length)

    for group in regroup(pieces(), GROUP_PIECES):
        samples = pack_pieces(group, packing, length=tally.length)
        tally.count_samples(samples)
        yield samples


def _documents(folder: Path, manifest: Manifest, advance: Advance) -> Iterator[tuple[Ints, Ints]]:
    """(starts, tokens) of the documents of each record batch of the split, in reading order."""
    begin = 0
    for shard, index in split_batches(folder, manifest, "train"):
        offsets = shard.offsets(index)
        tokens = np.diff(offsets)
        total = shard.record.batches[index].tokens
        if offsets[0] != 0 or offsets[-1] != total or int(tokens.min(initial=1)) < 1:
            raise DataError(
                f"shard {shard.path} is damaged: the offsets of its batch {index} do not rise from "
                f"0 to {total}; see `python tools/verify_shards.py {folder}`"
            )
        yield begin + offsets[:-1], tokens
        advance(total)
        begin += total


def cut_documents(starts: Ints, tokens: Ints, *, length: int) -> Pieces:
    """The pieces of documents given by first token and number of tokens, both (documents,)."""
    predictions = tokens - 1
    counts = -(-predictions // length)
    first = np.cumsum(counts) - counts
    within = (np.arange(int(counts.sum())) - np.repeat(first, counts)) * length
    rest = np.repeat(predictions, counts) - within
    return Pieces(np.repeat(starts, counts) + within, np.minimum(rest, length))


def regroup(pieces: Iterable[Pieces], size: int) -> Iterator[Pieces]:
    """The same pieces, so many at a time, the last ones fewer."""
    held: list[Pieces] = []
    waiting = 0
    for some in pieces:
        held.append(some)
        waiting += len(some.starts)
        if waiting < size:
            continue
        whole = _joined(held)
        for at in range(0, waiting - size + 1, size):
            yield Pieces(whole.starts[at : at + size], whole.lengths[at : at + size])
        done = waiting - waiting % size
        held, waiting = [Pieces(whole.starts[done:], whole.lengths[done:])], waiting - done
    if waiting:
        yield _joined(held)


def _joined(pieces: list[Pieces]) -> Pieces:
    return Pieces(
        np.concatenate([some.starts for some in pieces]),
        np.concatenate([some.lengths for some in pieces]),
    )


def pack_pieces(pieces: Pieces, packing: Packing, *, length: int) -> SampleGroup:
    """Samples of at most `length` positions that hold each piece once."""
    count = len(pieces.starts)
    if packing != "best_fit":
        return SampleGroup(pieces, np.ones(count, dtype=np.int64))
    bins = best_fit_decreasing(pieces.lengths, length)
    # Written backwards, so that each bin keeps the number of its first piece.
    first = np.empty(int(bins.max(initial=-1)) + 1, dtype=np.int64)
    first[bins[::-1]] = np.arange(count - 1, -1, -1)
    order = np.argsort(first[bins], kind="stable")
    counts = np.bincount(bins)[np.argsort(first)]
    return SampleGroup(Pieces(pieces.starts[order], pieces.lengths[order]), counts)
