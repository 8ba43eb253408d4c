"""The page cache and the memory of this process, as Linux tells them (proc(5), mincore(2))."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_BLOCK_BYTES: Final = 4 << 20


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Asks that no page of the files stay in the page cache; others' files keep theirs."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(paths: Iterable[Path]) -> None:
    """Brings the files into the page cache."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cached_bytes(paths: Iterable[Path]) -> int:
    """How much of the files is in the page cache, in whole pages."""
    return sum(_cached_pages(path) for path in paths) * mmap.PAGESIZE


def has_holes(paths: Iterable[Path]) -> bool:
    """Whether the files take less room than they are long: holes are slow to ask about."""
    states = [path.stat() for path in paths]
    return 512 * sum(s.st_blocks for s in states) < sum(s.st_size for s in states) // 2


def read_counters() -> tuple[int, int]:
    """Bytes that this process had fetched from storage, and bytes that its read calls returned."""
    fields = _fields(Path("/proc/self/io"))
    return int(fields["read_bytes"]), int(fields["rchar"])


def private_bytes() -> int:
    """Memory that only this process has and that is no copy of a file."""
    kib = _fields(Path("/proc/self/smaps_rollup"))["Private_Dirty"].split()[0]
    return int(kib) * 1024


def _cached_pages(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as stream:
        # A private writable map, since ctypes takes the address of writable ones only.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    first = ctypes.c_char.from_buffer(mapped)
    failed = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found
    )
    del first
    mapped.close()
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(page & 1 for page in bytes(found))


def _fields(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
