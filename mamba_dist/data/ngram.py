"""Baselines that a language model has to beat: unigram and bigram, in nats per token.

Witten-Bell smoothing, interpolated (Witten and Bell 1991; Chen and Goodman 1999, eq. 17 on): with c
counts, T(v) distinct successors of v, T distinct tokens, N tokens, V vocabulary:

    p(w)     = (c(w) + T / V) / (N + T)
    p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)),   and p(w) where v was never seen

Counting is exact; only pairs that occur are stored.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mamba_dist.data.batch import IGNORED_LABEL

# Pairs are counted in groups of so many, which bounds the memory beside the table itself.
_GROUP_PAIRS = 1 << 24

Pairs = Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NgramCounts:
    """Counts of a text: `unigram` (V,), and the pairs that occur as codes v·V + w, ascending."""

    vocab_size: int
    unigram: Ids
    pair_codes: Ids
    pair_counts: Ids


@dataclass(frozen=True)
class BaselineLosses:
    """Mean negative log likelihood in nats per token, over `tokens` labels."""

    unigram: float
    bigram: float
    tokens: int


def count_ngrams(pairs: Pairs, *, vocab_size: int) -> NgramCounts:
    """The counts over (input_ids, labels) arrays of equal shape, at positions with a label.

    Raises:
        ValueError: nothing was to be counted.
    """
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    group: list[Ids] = []
    grouped = 0
    for inputs, labels in pairs:
        group.append(_codes(inputs, labels, vocab_size))
        grouped += group[-1].size
        if grouped >= _GROUP_PAIRS:
            codes, counts = _merge(codes, counts, group)
            group, grouped = [], 0
    codes, counts = _merge(codes, counts, group)
    if codes.size == 0:
        raise ValueError("no labels to count")
    unigram = np.zeros(vocab_size, np.int64)
    np.add.at(unigram, codes % vocab_size, counts)
    return NgramCounts(vocab_size, unigram, codes, counts)


def baseline_losses(counts: NgramCounts, pairs: Pairs) -> BaselineLosses:
    """How well the counts predict other text; both losses over the same labels.

    Raises:
        ValueError: nothing was to be predicted.
    """
    contexts = counts.pair_codes // counts.vocab_size
    seen = np.zeros(counts.vocab_size, np.int64)
    np.add.at(seen, contexts, counts.pair_counts)
    successors = np.bincount(contexts, minlength=counts.vocab_size)
    unigram = _unigram_probabilities(counts)
    unigram_nats = bigram_nats = 0.0
    tokens = 0
    for inputs, labels in pairs:
        codes = _codes(inputs, labels, counts.vocab_size)
        context, token = np.divmod(codes, counts.vocab_size)
        lower = unigram[token]
        total = seen[context] + successors[context]
        known = total > 0
        higher = (_pair_counts(counts, codes) + successors[context] * lower) / np.maximum(total, 1)
        unigram_nats -= float(np.log(lower).sum())
        bigram_nats -= float(np.log(np.where(known, higher, lower)).sum())
        tokens += codes.size
    if tokens == 0:
        raise ValueError("no labels to predict")
    return BaselineLosses(unigram_nats / tokens, bigram_nats / tokens, tokens)


def _codes(inputs: npt.ArrayLike, labels: npt.ArrayLike, vocab_size: int) -> Ids:
    context = np.asarray(inputs).reshape(-1).astype(np.int64)
    token = np.asarray(labels).reshape(-1).astype(np.int64)
    kept = token != IGNORED_LABEL
    return np.asarray(context[kept] * vocab_size + token[kept], dtype=np.int64)


def _merge(codes: Ids, counts: Ids, group: list[Ids]) -> tuple[Ids, Ids]:
    new, new_counts = np.unique(np.concatenate([*group, np.zeros(0, np.int64)]), return_counts=True)
    merged, place = np.unique(np.concatenate([codes, new]), return_inverse=True)
    total = np.zeros(merged.size, np.int64)
    np.add.at(total, place, np.concatenate([counts, new_counts]))
    return merged, total


def _pair_counts(counts: NgramCounts, codes: Ids) -> Ids:
    place = np.searchsorted(counts.pair_codes, codes)
    place = np.minimum(place, counts.pair_codes.size - 1)
    found = counts.pair_codes[place] == codes
    return np.asarray(np.where(found, counts.pair_counts[place], 0), dtype=np.int64)


def _unigram_probabilities(counts: NgramCounts) -> npt.NDArray[np.float64]:
    distinct = int(np.count_nonzero(counts.unigram))
    tokens = int(counts.unigram.sum())
    probabilities = (counts.unigram + distinct / counts.vocab_size) / (tokens + distinct)
    return np.asarray(probabilities, dtype=np.float64)
