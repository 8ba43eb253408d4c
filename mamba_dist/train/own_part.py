"""When a rank writes its own part of a save, and when it waits there for the others.

Training waits at a save for one of two: this rank's own disk, or the other ranks in a collective.
Whoever watches over a rank that hangs must know which: others may be slow and well, and the
collective's own timeout bounds that, but a disk that does nothing for long does not answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mamba_dist.checkpoint.ranks import Ranks


@dataclass(frozen=True)
class Writing:
    """What a rank has of its own to write, or to wait for until its writer has written it."""

    step: int
    """Of the save."""
    done: int
    """Changes with each block that is written, and with each stage."""


class OwnPart:
    """The ranks of a run as its saves ask them, which takes note of when they are asked."""

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self._ranks = ranks
        self._step: int | None = None
        self._done = 0

    def now(self) -> Writing | None:
        """What training waits for here; None: for nothing, or for the other ranks."""
        step = self._step
        return None if step is None else Writing(step, self._done)

    def wrote(self) -> None:
        """Takes note of a block; for any thread."""
        self._done += 1

    @contextmanager
    def of_save(self, step: int) -> Iterator[None]:
        """Training waits inside: for this rank, but in collectives."""
        with self._waiting_for(step):
            yield

    def any_rank(self, flag: bool) -> bool:
        """As the ranks say."""
        with self._waiting_for(None):
            return self._ranks.any_rank(flag)

    def from_first(self, values: Sequence[int]) -> list[int]:
        """As the ranks say."""
        with self._waiting_for(None):
            return self._ranks.from_first(values)

    @contextmanager
    def _waiting_for(self, step: int | None) -> Iterator[None]:
        before, self._step = self._step, step
        self._done += 1
        try:
            yield
        finally:
            self._done += 1
            self._step = before
