"""A copy of a rank's state in host memory, from which it is written while training goes on.

The memory is taken once and copied into at each save: pages that are touched for the first time
cost more than the copy. Copying goes on beside the next forward and backward pass, which only read
the state, and the update after them waits for it: on a CPU another thread copies, on a device
another stream, into pinned memory.
"""

import threading
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor

from mamba_dist.engine.base import STATE_KINDS, Fragment

_ITEM_BYTES: Final = 4


def state_bytes(fragments: Iterable[Fragment]) -> int:
    """Size of the fragments' tensors."""
    return sum(len(STATE_KINDS) * _ITEM_BYTES * one.master.numel() for one in fragments)


def copy_bytes(fragments: Iterable[Fragment]) -> int:
    """What a `HostCopy` of them takes of the host's memory.

    torch rounds pinned memory up to a power of two (`CachingHostAllocator.h`), and all of it is
    taken.
    """
    listed = list(fragments)
    size = state_bytes(listed)
    on_device = any(one.master.is_cuda for one in listed)
    return 1 << (size - 1).bit_length() if on_device else size


class HostCopy:
    """Memory for one copy of the fragments of a rank."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        """Takes the memory, and touches each page of it.

        Raises:
            RuntimeError: there is not enough.
        """
        listed = list(fragments)
        items = state_bytes(listed) // _ITEM_BYTES
        device = next((one.master.device for one in listed if one.master.is_cuda), None)
        self._on_device = device is not None
        self._stream: torch.cuda.Stream | None = None
        # A new thread works on the first device, whichever its process does: a stream from there
        # would not have the copies in it, and its event come before they are made.
        with nullcontext() if device is None else torch.cuda.device(device):
            self._memory = torch.empty(items, dtype=torch.float32, pin_memory=self._on_device)
            if device is not None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory.zero_()
        self._on_stream: torch.cuda.Event | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._finished = threading.Event()

    def begin(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments in this memory, where they are only after `complete`."""
        place = 0
        copies = []
        self._pairs.clear()
        self._finished.clear()
        for one in fragments:
            tensors = []
            for kind in STATE_KINDS:
                source = one.tensor(kind).detach()
                target = self._memory[place : place + source.numel()]
                place += source.numel()
                self._pairs.append((target, source))
                tensors.append(target)
            copies.append(Fragment(one.name, one.shape, one.start, *tensors))
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy()
                self._on_stream = self._stream.record_event()
        return copies

    def complete(self) -> None:
        """Returns when all is copied; for the thread that writes it."""
        try:
            if self._on_stream is not None:
                self._on_stream.synchronize()
            else:
                self._copy()
        finally:
            self._finished.set()

    def hold_updates(self) -> None:
        """Lets whatever changes the state wait until it is copied; after `begin`, each time."""
        if self._on_stream is not None:
            torch.cuda.current_stream().wait_event(self._on_stream)
        else:
            self._finished.wait()

    def _copy(self) -> None:
        while self._pairs:
            target, source = self._pairs.pop()
            target.copy_(source, non_blocking=self._on_device)
