"""What a run reads, optimizer step by optimizer step, and how it is set back."""

from collections.abc import Callable, Generator, Iterator

from mamba_dist.data.batch import Batch
from mamba_dist.data.segments import RunOrder


class Steps(Iterator[list[Batch]]):
    """This rank's micro-batches of one optimizer step after another.

    `begin(order, step)` reads from a step on, in an order.
    """

    def __init__(
        self, begin: Callable[[RunOrder, int], Generator[list[Batch]]], order: RunOrder, step: int
    ) -> None:
        self._begin = begin
        self._order = order
        self._batches = begin(order, step)

    @property
    def order(self) -> RunOrder:
        """The order of samples of the whole run."""
        return self._order

    def __next__(self) -> list[Batch]:
        return next(self._batches)

    def restart(self, order: RunOrder, step: int) -> None:
        """Goes on from `step`, in an order that may pass over samples; what was read ahead is lost.

        Raises:
            ValueError: the step is of an earlier mixture or batch size.
        """
        self._batches.close()
        self._order = order
        self._batches = self._begin(order, step)
