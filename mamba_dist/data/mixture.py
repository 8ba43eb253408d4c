"""Which source each position of a weighted mixture reads: in closed form, O(log sources), no index.

The sources are the leaves of a Huffman tree over their weights. Of the first n positions of a node
whose halves weigh a and b, round(n·a / (a + b)) go left: so where the count steps, that position
goes left, and the count is its number there. All arithmetic is of integers, exact at any n.

Each half is off by at most 1/2 from its share of its parent. In a Huffman tree an inner node holds
at most 2/3 of its parent's weight, so inner nodes are off by less than 1/2 · 1/(1 - 2/3) = 3/2 and
every source by less than 2 samples from its exact share of any beginning of the mixture.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count


@dataclass(frozen=True)
class _Split:
    """An inner node; each half is a source's number or a node."""

    left: "int | _Split"
    right: "int | _Split"
    left_weight: int
    right_weight: int

    @property
    def weight(self) -> int:
        return self.left_weight + self.right_weight

    def goes_left(self, prefix: int) -> int:
        """How many of the first `prefix` positions go left."""
        return (prefix * self.left_weight + self.weight // 2) // self.weight

    def longest(self, most: int, *, left: bool) -> int:
        """The longest prefix of which at most so many positions go to one half."""
        rounding = self.weight // 2
        if left:
            return ((most + 1) * self.weight - rounding - 1) // self.left_weight
        return (most * self.weight + rounding) // self.right_weight


class Interleave:
    """The endless interleaving of sources by weight."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights {weights}: expected at least one, all above 0")
        self._sources = len(weights)
        self._tree = _huffman(weights)

    def locate(self, position: int) -> tuple[int, int]:
        """The source at a position, and how many positions before it have the same source."""
        node = self._tree
        while isinstance(node, _Split):
            before = node.goes_left(position)
            if node.goes_left(position + 1) > before:
                node, position = node.left, before
            else:
                node, position = node.right, position - before
        return node, position

    def counts(self, prefix: int) -> list[int]:
        """How many of the first `prefix` positions each source has."""
        counts = [0] * self._sources
        todo = [(self._tree, prefix)]
        while todo:
            node, length = todo.pop()
            if isinstance(node, _Split):
                left = node.goes_left(length)
                todo += [(node.left, left), (node.right, length - left)]
            else:
                counts[node] = length
        return counts

    def longest(self, limits: Sequence[int | None]) -> int | None:
        """The longest prefix in which no source has more positions than its limit; None: endless.

        The position after it is the first that would break a limit.
        """
        return _longest(self._tree, limits)


def _huffman(weights: Sequence[Fraction]) -> int | _Split:
    scale = math.lcm(*(weight.denominator for weight in weights))
    number = count()  # decides between equal weights, by the order of the sources
    heap: list[tuple[int, int, int | _Split]] = [
        (int(weight * scale), next(number), source) for source, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        first_weight, _, first = heapq.heappop(heap)
        second_weight, _, second = heapq.heappop(heap)
        node = _Split(first, second, first_weight, second_weight)
        heapq.heappush(heap, (node.weight, next(number), node))
    return heap[0][2]


def _longest(node: int | _Split, limits: Sequence[int | None]) -> int | None:
    if not isinstance(node, _Split):
        return limits[node]
    halves = ((_longest(node.left, limits), True), (_longest(node.right, limits), False))
    longest = [node.longest(most, left=left) for most, left in halves if most is not None]
    return min(longest, default=None)


@dataclass(frozen=True)
class _Phase:
    """Positions from `begin` on, until the next source is exhausted; `before` counts each source's
    positions up to there."""

    begin: int
    sources: tuple[int, ...]
    interleave: Interleave
    before: tuple[int, ...]


class Mixture:
    """Sources by weight, each until its limit; the others then share by their weights.

    `end` is the number of positions until all are exhausted, None if some source never is.
    """

    def __init__(self, weights: Sequence[Fraction], limits: Sequence[int | None]) -> None:
        self._phases: list[_Phase] = []
        self.end: int | None = None
        begin, before = 0, [0] * len(weights)
        while active := _unexhausted(before, limits):
            interleave = Interleave([weights[source] for source in active])
            self._phases.append(_Phase(begin, tuple(active), interleave, tuple(before)))
            left = [_left(limits[source], before[source]) for source in active]
            length = interleave.longest(left)
            if length is None:
                return
            for source, more in zip(active, interleave.counts(length), strict=True):
                before[source] += more
            begin += length
        self.end = begin
        self._total = tuple(before)

    def locate(self, position: int) -> tuple[int, int]:
        """The source at a position, and how many positions before it have the same source."""
        if position < 0 or (self.end is not None and position >= self.end):
            raise ValueError(f"position {position} lies outside a mixture of {self.end} samples")
        phase = self._phase(position)
        index, number = phase.interleave.locate(position - phase.begin)
        source = phase.sources[index]
        return source, phase.before[source] + number

    def counts(self, prefix: int) -> list[int]:
        """How many of the first `prefix` positions each source has."""
        if self.end is not None and prefix >= self.end:
            return list(self._total)
        phase = self._phase(prefix)
        counts = list(phase.before)
        for source, more in zip(
            phase.sources, phase.interleave.counts(prefix - phase.begin), strict=True
        ):
            counts[source] += more
        return counts

    def _phase(self, position: int) -> _Phase:
        return self._phases[bisect_right(self._phases, position, key=lambda p: p.begin) - 1]


def _unexhausted(before: Sequence[int], limits: Sequence[int | None]) -> list[int]:
    return [s for s, limit in enumerate(limits) if limit is None or before[s] < limit]


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else limit - used
