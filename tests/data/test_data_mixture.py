from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.data.mixture import Interleave, Mixture

MOST_OFF = 2
TRILLIONS = 10**13

weights_of_sources = st.lists(
    st.fractions(min_value=Fraction(1, 1000), max_value=1000, max_denominator=1000),
    min_size=1,
    max_size=12,
)


def naive_counts(located: list[tuple[int, int]], sources: int) -> list[int]:
    return [sum(1 for source, _ in located if source == each) for each in range(sources)]


@settings(deadline=None)
@given(weights=weights_of_sources, start=st.integers(0, TRILLIONS))
def test_each_source_numbers_its_own_samples_without_gap_anywhere(
    weights: list[Fraction], start: int
) -> None:
    mixture = Interleave(weights)
    expected = mixture.counts(start)
    for position in range(start, start + 100):
        source, number = mixture.locate(position)
        assert number == expected[source]
        expected[source] += 1
        assert mixture.counts(position + 1) == expected


@settings(deadline=None)
@given(weights=weights_of_sources, prefix=st.integers(0, TRILLIONS))
def test_every_beginning_has_the_exact_shares_up_to_two_samples(
    weights: list[Fraction], prefix: int
) -> None:
    total = sum(weights)
    counts = Interleave(weights).counts(prefix)
    assert sum(counts) == prefix
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - prefix * weight / total) < MOST_OFF


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=8), periods=st.integers(1, 10**9))
def test_whole_numbers_as_weights_come_out_exactly_after_each_period(
    weights: list[int], periods: int
) -> None:
    mixture = Interleave([Fraction(weight) for weight in weights])
    assert mixture.counts(sum(weights) * periods) == [weight * periods for weight in weights]


def test_equal_sources_take_turns() -> None:
    mixture = Interleave([Fraction(1, 2)] * 2)
    sources = [mixture.locate(position)[0] for position in range(8)]
    assert sources in ([0, 1] * 4, [1, 0] * 4)


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    data=st.data(),
)
def test_exhausted_sources_leave_their_place_to_the_others(
    weights: list[int], data: st.DataObject
) -> None:
    limits = data.draw(
        st.lists(
            st.one_of(st.none(), st.integers(0, 40)), min_size=len(weights), max_size=len(weights)
        )
    )
    mixture = Mixture([Fraction(weight) for weight in weights], limits)
    bounded = None not in limits
    assert mixture.end == (sum(limit or 0 for limit in limits) if bounded else None)
    length = mixture.end if mixture.end is not None else 300
    located = [mixture.locate(position) for position in range(length)]
    for source, limit in enumerate(limits):
        numbers = [number for each, number in located if each == source]
        assert numbers == list(range(len(numbers)))
        assert limit is None or len(numbers) <= limit
    for prefix in range(0, length + 1, 7):
        assert mixture.counts(prefix) == naive_counts(located[:prefix], len(weights))
    # From the last exhaustion on, those that are left share by their weights.
    left = [s for s, limit in enumerate(limits) if limit is None]
    if left:
        far, farther = mixture.counts(10**6), mixture.counts(3 * 10**6)
        total = sum(weights[source] for source in left)
        for source in left:
            more = farther[source] - far[source]
            assert abs(more - Fraction(2 * 10**6 * weights[source], total)) < 2 * MOST_OFF
        assert [far[s] for s, limit in enumerate(limits) if limit is not None] == [
            limit for limit in limits if limit is not None
        ]


@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=6), limit=st.integers(1, 10**12))
def test_a_source_is_exhausted_at_the_first_position_that_it_cannot_serve(
    weights: list[int], limit: int
) -> None:
    exact = [Fraction(weight) for weight in weights]
    limits = [limit, *[None] * (len(weights) - 1)]
    unlimited, mixture = Interleave(exact), Mixture(exact, limits)
    length = unlimited.longest(limits)
    assert length is not None
    assert unlimited.locate(length) == (0, limit)
    assert mixture.locate(length - 1) == unlimited.locate(length - 1)
    assert mixture.locate(length)[0] != 0


def test_positions_outside_are_refused() -> None:
    mixture = Mixture([Fraction(1), Fraction(2)], [3, 4])
    assert mixture.end == 7
    for position in (-1, 7):
        with pytest.raises(ValueError, match="outside a mixture of 7"):
            mixture.locate(position)
    with pytest.raises(ValueError, match="above 0"):
        Interleave([Fraction(0)])
