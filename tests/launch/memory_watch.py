"""The memory of a launch: proportional set sizes of a process and all below it, sampled."""

import os
import threading
import time
from pathlib import Path


class MemoryWatch:
    """Context that samples what a process group holds, each shared page counted once.

    The page cache is not counted. `peak_bytes` is the largest sample.
    """

    def __init__(self, group: int, *, every_s: float = 0.2) -> None:
        self.peak_bytes = 0
        self._group, self._every_s = group, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.peak_bytes = max(self.peak_bytes, group_bytes(self._group))
            time.sleep(self._every_s)


def group_bytes(group: int) -> int:
    """PSS of all processes of a process group or session at this moment."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) != group:
                continue
            lines = (entry / "smaps_rollup").read_text().splitlines()
        except (OSError, ValueError):
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total
