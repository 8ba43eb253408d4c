"""Has the C library keep what is freed, so that no step faults the same pages in again.

glibc gives large blocks back at once, and each allocation of the next step starts with untouched
pages: an eighth of a small model's step on the CPU (`tools/bench.py train --allocator both`). The
price is memory: a process keeps its peak until it ends, and what is freed between smaller blocks
does not fit the next large one. A rank of the 130m shape under ZeRO-3, which never had more than
2.5 GiB allocated, came to 4.3 GiB. Where that is not there, large blocks go back at once: 2.8 GiB.
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
# Of a model for which memory is short, what is larger takes most of it.
_SPARED_BYTES: Final = 4 << 20
_SPARED_TOP_BYTES: Final = 64 << 20
# What the heap grows by, so that it does not ask the kernel for every tensor.
_GROWTH_BYTES: Final = 64 << 20


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Sets this process's allocator, unless the user's `environment` has set it.

    Without effect where the C library is not glibc or another allocator is preloaded.
    """
    _set(environment, {_M_MMAP_THRESHOLD: _KEPT_BYTES, _M_TRIM_THRESHOLD: _KEPT_BYTES})


def give_back_freed_memory(environment: Mapping[str, str]) -> None:
    """The contrary of `keep_freed_memory` for large blocks, on the same terms; at any time."""
    _set(environment, {_M_MMAP_THRESHOLD: _SPARED_BYTES, _M_TRIM_THRESHOLD: _SPARED_TOP_BYTES})


def _set(environment: Mapping[str, str], options: Mapping[int, int]) -> None:
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in environment):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in {**options, _M_TOP_PAD: _GROWTH_BYTES}.items():
        mallopt(option, value)
