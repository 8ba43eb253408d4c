"""Has the C library keep what is freed, so that no step faults the same pages in again.

glibc gives large blocks back at once, and each allocation of the next step starts with untouched
pages: an eighth of a small model's step on the CPU (`tools/bench.py train --allocator both`). The
price is that a process keeps its peak until it ends, which a training step needs anyway.
"""

import ctypes
from collections.abc import Mapping
from typing import Final

# Names and numbers of mallopt(3).
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
# Above any tensor of a step that is worth keeping; mallopt takes an int.
_KEPT_BYTES: Final = 1 << 30
# What the heap grows by, so that it does not ask the kernel for every tensor.
_GROWTH_BYTES: Final = 64 << 20


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Sets this process's allocator, unless the user's `environment` has set it.

    Without effect where the C library is not glibc or another allocator is preloaded.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in environment):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in (
        (_M_MMAP_THRESHOLD, _KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        (_M_TOP_PAD, _GROWTH_BYTES),
    ):
        mallopt(option, value)
