import itertools
import random
from collections.abc import Iterator

import pytest

from mamba_dist.data.preparation.lines import lines_beginning_in, lines_of


def blocks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def in_ranges(data: bytes, cuts: list[int], *, block: int, most: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    for start, stop in itertools.pairwise(cuts):
        rest = blocks(data[max(start - 1, 0) :], block)
        found += lines_beginning_in(rest, start=start, stop=stop, most_bytes=most)
    return found


def test_every_line_belongs_to_exactly_the_range_that_it_begins_in() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        data = bytes(rng.choices(b"ab\n", k=rng.randrange(1, 40)))
        cuts = [
            0,
            *sorted(rng.sample(range(len(data)), rng.randrange(min(len(data), 6)))),
            len(data),
        ]
        whole = data.split(b"\n")
        if not whole[-1]:
            whole.pop()  # nothing begins after the last line feed
        block, most = rng.choice([1, 2, 7, 100]), rng.choice([0, 1, 3, 100])
        expected = [line if len(line) <= most else None for line in whole]
        assert in_ranges(data, cuts, block=block, most=most) == expected, (data, cuts)
        listed = list(lines_of(blocks(data, block), most_bytes=most))
        assert listed[: len(expected)] == expected


class Counted:
    """Endless zeros, and how many were asked for."""

    def __init__(self, before: bytes) -> None:
        self.read = 0
        self._before = before

    def __iter__(self) -> Iterator[bytes]:
        block = self._before
        while True:
            self.read += len(block)
            yield block
            block = bytes(1000)


@pytest.mark.parametrize("start", [0, 5000])
def test_an_endless_line_is_read_no_farther_than_its_range_and_the_limit(start: int) -> None:
    source = Counted(b"x\n" if start == 0 else b"")
    found = list(lines_beginning_in(iter(source), start=start, stop=9000, most_bytes=2500))
    assert found == ([b"x", None] if start == 0 else [])
    assert source.read <= 11_000
