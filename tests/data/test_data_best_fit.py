import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.data.best_fit import best_fit_decreasing


def naive_loads(sizes: list[int], capacity: int) -> list[list[int]]:
    """The items of each bin, one item at a time: the largest first, where it fits most tightly."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [items for items in bins if capacity - sum(items) >= size]
        if fitting:
            min(fitting, key=lambda items: capacity - sum(items)).append(size)
        else:
            bins.append([size])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_the_room_left_in_the_bins_is_that_of_placing_one_item_at_a_time(
    case: tuple[int, list[int]],
) -> None:
    capacity, sizes = case
    bins = best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity)
    expected = naive_loads(sizes, capacity)
    assert len(bins) == len(sizes)
    loads = np.bincount(bins, weights=sizes, minlength=len(expected)) if sizes else np.zeros(0)
    assert sorted(loads.tolist()) == sorted(map(sum, expected))


def test_items_of_equal_size_stay_in_order() -> None:
    assert best_fit_decreasing(np.array([3, 5, 3, 2, 3]), 6).tolist() == [1, 0, 1, 2, 2]


def test_an_item_that_fits_no_bin_is_a_programming_error() -> None:
    for sizes in ([1, 9], [0, 2]):
        with pytest.raises(ValueError, match="do not fit bins of 8"):
            best_fit_decreasing(np.array(sizes), 8)
