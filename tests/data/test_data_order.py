import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_dist.data.order import SampleOrder

TRILLIONS = 10**13
PINNED = [6, 3, 10, 5, 2, 8, 1, 11, 7, 9, 0, 4]
PINNED_FAR = 9731858116845


@given(windows=st.integers(1, 600), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_every_window_comes_exactly_once_per_epoch(windows: int, seed: int, epoch: int) -> None:
    order = SampleOrder(windows, seed)
    located = [order.locate(epoch * windows + i) for i in range(windows)]
    assert {e for e, _ in located} == {epoch}
    assert sorted(window for _, window in located) == list(range(windows))


@given(
    windows=st.integers(TRILLIONS, 2**62),
    seed=st.integers(0, 2**63 - 1),
    positions=st.sets(st.integers(0, TRILLIONS - 1), min_size=2, max_size=20),
)
def test_ten_trillion_windows_are_located_without_an_index(
    windows: int, seed: int, positions: set[int]
) -> None:
    order = SampleOrder(windows, seed)
    found = {order.locate(position) for position in positions}
    assert len(found) == len(positions)
    assert all(epoch == 0 and 0 <= window < windows for epoch, window in found)


def test_locating_takes_microseconds_at_any_size() -> None:
    order = SampleOrder(TRILLIONS, 1)
    begun_at = time.thread_time()
    for position in range(0, 3 * TRILLIONS, TRILLIONS // 500):
        order.locate(position)
    assert (time.thread_time() - begun_at) / 1500 < 1e-3


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = SampleOrder(1000, seed)
        return [order.locate(number * 1000 + i)[1] for i in range(1000)]

    base = epoch(0, 0)
    for other in (epoch(0, 1), epoch(1, 0), list(range(1000))):
        in_place = sum(a == b for a, b in zip(base, other, strict=True))
        assert in_place < 20  # 1 is expected of a random permutation


def test_neighbours_are_spread_evenly_over_the_data() -> None:
    order = SampleOrder(10_000, 3)
    firsts = [order.locate(i)[1] for i in range(1000)]
    per_tenth = [sum(1 for w in firsts if w // 1000 == tenth) for tenth in range(10)]
    assert all(60 <= count <= 140 for count in per_tenth)


def test_without_shuffle_the_order_is_that_of_the_shards() -> None:
    order = SampleOrder(7, 5, shuffle=False)
    assert [order.locate(i) for i in range(10)] == [(i // 7, i % 7) for i in range(10)]


def test_the_order_of_a_seed_never_changes_between_versions() -> None:
    # A run that is resumed with a newer version must go on with the same samples.
    order = SampleOrder(12, 42)
    assert [order.locate(i)[1] for i in range(12)] == PINNED
    assert SampleOrder(TRILLIONS, 42).locate(5 * TRILLIONS + 123)[1] == PINNED_FAR


def test_positions_before_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="before the beginning"):
        SampleOrder(3, 0).locate(-1)
