"""Work on a GPU recorded as a CUDA graph: queued once, then launched as a whole.

A graph holds addresses and not values, so what changes between its launches lies in buffers that
stay where they are. What it records has to run without waiting for the device and without shapes
that depend on data.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

# Kernels are compiled, tuned and loaded by the first run; libraries settle by the second.
_WARM_UP_RUNS: Final = 2


class Recording(Protocol):
    """What was recorded, as `torch.cuda.CUDAGraph` offers it."""

    def replay(self) -> None:
        """Launches it on what its buffers hold now."""

    def pool(self) -> Any:
        """The memory that it works in, which later recordings of the same stream may share."""


def record(
    compute: Callable[[], None],
    device: torch.device,
    *,
    warm_up: Callable[[], None] | None = None,
    pool: Any = None,
) -> Recording:
    """What `compute` launches on the CUDA device `device`; nothing of it has run yet.

    Args:
        warm_up: run twice before, unrecorded; `compute` itself if left out.
        pool: of an earlier recording that is never launched at the same time.

    Raises:
        RuntimeError: it does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # The default stream cannot be captured, and what the first run prepares belongs to its
        # stream.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                (warm_up or compute)()
        current.wait_stream(side)
        # Of this thread alone: NCCL's and others' look at events of their own meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            compute()
    return graph
