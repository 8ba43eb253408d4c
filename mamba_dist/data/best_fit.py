"""Best-fit-decreasing bin packing of items whose sizes are whole numbers up to the capacity.

Items go in by falling size, each into the bin with the least room that still holds it, or into a
new one (Johnson 1974: at most 11/9 of the fewest bins, plus 4). What this costs depends on the
number of different sizes rather than of items: bins of equal room are interchangeable, and so are
items of equal size. While items of size s are placed, the bins with the least fitting room r take
r // s of them each, since a bin that took one is the best fit for the next until none fits any
more; so all items of a size go into all bins of a room by one numpy operation.
"""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def best_fit_decreasing(sizes: Ints, capacity: int) -> Ints:
    """The bin of each item (n,) int64; bins are numbered from 0 in the order they are opened.

    Items of equal size are placed in the order given, so the answer is a function of the arguments.

    Raises:
        ValueError: a size is below 1 or above the capacity.
    """
    if sizes.size and (int(sizes.min()) < 1 or int(sizes.max()) > capacity):
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()} do not fit bins of {capacity}")
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    placed = _Bins(capacity)
    bins = np.empty(len(sizes), dtype=np.int64)
    at = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = at + count
        while at < end:
            taken = placed.place(size, end - at)
            bins[order[at : at + len(taken)]] = taken
            at += len(taken)
    return bins


class _Bins:
    """Open bins by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._opened = 0
        self._rooms: list[int] = []  # rising, those with bins only
        self._bins: dict[int, list[Ints]] = {}

    def place(self, size: int, count: int) -> Ints:
        """The bins that take the next up to `count` items of a size: those of one room only."""
        index = bisect_left(self._rooms, size)
        room = self._rooms[index] if index < len(self._rooms) else self._capacity
        each = room // size
        wanted = -(-count // each)
        bins = self._take(index, wanted) if index < len(self._rooms) else self._open(wanted)
        items = min(count, each * len(bins))
        full, rest = divmod(items, each)
        self._put(bins[:full], room - each * size)
        if rest:
            self._put(bins[full:], room - rest * size)
        return np.repeat(bins, each)[:items]

    def _open(self, count: int) -> Ints:
        self._opened += count
        return np.arange(self._opened - count, self._opened, dtype=np.int64)

    def _take(self, index: int, most: int) -> Ints:
        """Up to so many bins of the room at an index, gone from it."""
        room = self._rooms[index]
        heap, taken, missing = self._bins[room], [], most
        while heap and missing:
            last = heap.pop()
            if len(last) > missing:
                heap.append(last[missing:])
                last = last[:missing]
            taken.append(last)
            missing -= len(last)
        if not heap:
            del self._bins[room], self._rooms[index]
        return np.concatenate(taken)

    def _put(self, bins: Ints, room: int) -> None:
        if not room or not len(bins):
            return
        if room not in self._bins:
            insort(self._rooms, room)
            self._bins[room] = []
        self._bins[room].append(bins)
