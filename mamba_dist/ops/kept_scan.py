"""What a scan computed, kept beside the graph, so that a recomputation need not scan again.

Activation checkpointing runs a region's forward twice. One that is a convolution, projections and a
scan costs little without the scan, whose output is in memory anyway: the next layer keeps it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Results = TypeVar("_Results", bound=tuple[Tensor | None, ...])


class KeptScan:
    """The results of one call of a scan: empty until its first run, taken back by all later ones.

    It holds the output and the states that the backward reads, for as long as somebody holds it,
    and not the final state, which may be larger than all of them: later runs get NaN for that.
    """

    def __init__(self) -> None:
        self._results: Any = None

    def results(self, run: Callable[[], _Results]) -> _Results:
        """What `run` gives: output, final state, and whatever the backward reads besides."""
        if self._results is not None:
            # New tensors, which can become the outputs of another graph.
            again: _Results = _detached(self._results)
            return again
        results = run()
        y, final_state, *states = results
        assert final_state is not None
        lost = final_state.new_full((), torch.nan).expand(final_state.shape)
        # The outputs themselves become part of a graph, which may own whoever holds this.
        self._results = _detached((y, lost, *states))
        return results


def refuse_final_state(kept: KeptScan | None, wanted: bool) -> None:
    """Raises ValueError for a call that wants what `kept` does not hold."""
    if wanted and kept is not None:
        raise ValueError("return_final_state is True beside `kept`, which holds no final state")


def _detached(tensors: Any) -> Any:
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)
