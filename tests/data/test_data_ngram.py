import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.data import ngram
from mamba_dist.data.batch import IGNORED_LABEL
from mamba_dist.data.ngram import baseline_losses, count_ngrams

V = 12
Pair = tuple[np.ndarray, np.ndarray]


def naive(fit: list[Pair], test: list[Pair]) -> tuple[float, float]:
    """Both losses with dictionaries, one token at a time."""
    pairs: Counter[tuple[int, int]] = Counter()
    unigram: Counter[int] = Counter()
    for inputs, labels in fit:
        for v, w in zip(inputs.ravel().tolist(), labels.ravel().tolist(), strict=True):
            if w != IGNORED_LABEL:
                pairs[v, w] += 1
                unigram[w] += 1
    tokens = sum(unigram.values())
    losses: list[tuple[float, float]] = []
    for inputs, labels in test:
        for v, w in zip(inputs.ravel().tolist(), labels.ravel().tolist(), strict=True):
            if w == IGNORED_LABEL:
                continue
            p1 = (unigram[w] + len(unigram) / V) / (tokens + len(unigram))
            after = {y: c for (x, y), c in pairs.items() if x == v}
            p2 = p1
            if after:
                p2 = (pairs[v, w] + len(after) * p1) / (sum(after.values()) + len(after))
            losses.append((-math.log(p1), -math.log(p2)))
    return tuple(sum(column) / len(losses) for column in zip(*losses, strict=True))  # type: ignore[return-value]


def made_pairs(seed: int, batches: int = 3, spread: int = V) -> list[Pair]:
    rng = random.Random(seed)
    found = []
    for _ in range(batches):
        ids = [[rng.randrange(spread) for _ in range(9)] for _ in range(2)]
        labels = np.array([[*row[1:], rng.randrange(spread)] for row in ids])
        labels[rng.randrange(2), rng.randrange(9)] = IGNORED_LABEL
        found.append((np.array(ids), labels))
    return found


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.integers(1, V), group=st.sampled_from([1, 20, 10**6]))
def test_losses_equal_a_naive_dictionary(seed: int, spread: int, group: int) -> None:
    fit, test = made_pairs(seed, spread=spread), made_pairs(seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "_GROUP_PAIRS", group)
        counts = count_ngrams(fit, vocab_size=V)
    found = baseline_losses(counts, test)
    unigram, bigram = naive(fit, test)
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)
    assert found.tokens == sum(int((labels != IGNORED_LABEL).sum()) for _, labels in test)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    counts = count_ngrams(made_pairs(3, spread=5), vocab_size=V)
    for context in range(V):
        total = {"unigram": 0.0, "bigram": 0.0}
        for token in range(V):
            losses = baseline_losses(counts, [([[context]], [[token]])])
            total["unigram"] += math.exp(-losses.unigram)
            total["bigram"] += math.exp(-losses.bigram)
        assert total == pytest.approx({"unigram": 1.0, "bigram": 1.0}, rel=1e-12)


def test_a_bigram_beats_a_unigram_on_text_with_structure() -> None:
    cycle = torch.arange(600).reshape(2, 300) % 50
    counts = count_ngrams([(cycle[:, :-1], cycle[:, 1:])], vocab_size=50_000)
    losses = baseline_losses(counts, [(cycle[:, :-1], cycle[:, 1:])])
    assert losses.unigram == pytest.approx(math.log(50), rel=0.05)
    assert losses.bigram < 1.0


def test_labels_to_be_ignored_are_not_counted() -> None:
    labels = np.array([[1, IGNORED_LABEL, 2]])
    counts = count_ngrams([(np.array([[0, 1, 2]]), labels)], vocab_size=V)
    assert counts.unigram.sum() == counts.pair_counts.sum() == 2
    assert counts.unigram[1] == counts.unigram[2] == 1


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="no labels to count"):
        count_ngrams([], vocab_size=V)
    counts = count_ngrams(made_pairs(1), vocab_size=V)
    with pytest.raises(ValueError, match="no labels to predict"):
        baseline_losses(counts, [(np.array([[1]]), np.array([[IGNORED_LABEL]]))])
