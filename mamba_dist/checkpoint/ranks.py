"""What saving and finding a checkpoint need of the ranks of a run."""

from collections.abc import Sequence
from typing import Protocol


class Ranks(Protocol):
    """The ranks that save or read together."""

    rank: int
    size: int

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; also a barrier."""

    def from_first(self, values: Sequence[int]) -> list[int]:
        """Rank 0's integers, on all ranks; those of the others don't count."""


class OneRank:
    """A process alone."""

    rank = 0
    size = 1

    def any_rank(self, flag: bool) -> bool:
        """The flag."""
        return flag

    def from_first(self, values: Sequence[int]) -> list[int]:
        """The integers."""
        return list(values)
