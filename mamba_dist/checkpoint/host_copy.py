"""A copy of a rank's state in host memory, from which it is written while training goes on.

The memory is taken once and copied into at each save: pages that are touched for the first time
cost more than the copy. It is pinned for a device, whose copy then takes its turn among the
kernels: what is launched later, the next update too, cannot change what is copied.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

from mamba_dist.engine.base import STATE_KINDS, Fragment

_ITEM_BYTES: Final = 4
_CGROUPS: Final = Path("/sys/fs/cgroup")


def state_bytes(fragments: Iterable[Fragment]) -> int:
    """Size of the fragments' tensors."""
    return sum(len(STATE_KINDS) * _ITEM_BYTES * one.master.numel() for one in fragments)


def available_bytes() -> int:
    """What this process could still take without swapping, as the kernel and cgroups say."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = 1024 * int(fields["MemAvailable"].split()[0])
    own = next(
        (
            line.removeprefix("0::").strip("/")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        ),
        "",
    )
    group = _CGROUPS / own
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_CGROUPS):
            break
        available = min(available, _left_in(folder, default=available))
    return available


class HostCopy:
    """Memory for one copy of the fragments of a rank."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        """Takes the memory, and touches each page of it.

        Raises:
            RuntimeError: there is not enough.
        """
        listed = list(fragments)
        items = state_bytes(listed) // _ITEM_BYTES
        self._on_device = any(one.master.is_cuda for one in listed)
        self._memory = torch.empty(items, dtype=torch.float32, pin_memory=self._on_device)
        self._memory.zero_()
        self._copied: torch.cuda.Event | None = None

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments as they are now, in this memory until the next copy; see `wait`."""
        place = 0
        taken = []
        for one in fragments:
            tensors = []
            for kind in STATE_KINDS:
                source = one.tensor(kind).detach()
                target = self._memory[place : place + source.numel()]
                target.copy_(source, non_blocking=self._on_device)
                place += source.numel()
                tensors.append(target)
            taken.append(Fragment(one.name, one.shape, one.start, *tensors))
        if self._on_device:
            self._copied = torch.cuda.current_stream().record_event()
        return taken

    def wait(self) -> None:
        """Returns when a device has really copied."""
        if self._copied is not None:
            self._copied.synchronize()


def _left_in(group: Path, *, default: int) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return default
    if limit == "max":
        return default
    # The page cache counts as used, though it is given up on demand.
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
