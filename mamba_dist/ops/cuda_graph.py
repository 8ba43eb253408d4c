"""Work on a GPU recorded as CUDA graphs: queued once, then launched as a whole.

A graph holds addresses and not values, so what changes between its launches lies in buffers that
stay where they are. What it records has to run without waiting for the device and without shapes
that depend on data.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

Work = Callable[[], None]

# Kernels are compiled, tuned and loaded by the first run; libraries settle by the second.
_WARM_UP_RUNS: Final = 2


class CudaRecorder:
    """Records work of one CUDA device, any number of times into the same memory.

    Recordings must not be launched at the same time; what one has left there and is still referred
    to by tensors is not taken by the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One stream for all: freed memory is only used again on the stream that it was taken on.
        # Not the default one, which cannot be recorded.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def warm_up(self, work: Work) -> None:
        """Runs `work` as often as must be before it, or what shares its kernels, is recorded."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with self._here():
            for _ in range(_WARM_UP_RUNS):
                work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """What repeats the work that `work` queues; nothing of it has run yet.

        Raises:
            RuntimeError: it does something that a graph cannot hold. The process can then not go on
                to use the device.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local", since NCCL's threads look at events of their own meanwhile.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                work()
        except RuntimeError as error:
            # Ending the recording fails too, by an error that says nothing.
            raise (error.__context__ or error) from None
        self._pool = graph.pool()
        return graph.replay

    def _here(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)
