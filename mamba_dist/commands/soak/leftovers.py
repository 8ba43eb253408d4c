"""What a launch leaves in shared memory and in its folder for temporary files."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_SHARED_MEMORY: Final = Path("/dev/shm")
# torchrun's own, which a SIGKILL keeps it from removing, and torch's for what it compiles.
_OF_TORCH: Final = ("torchelastic_", "torchinductor_")
_PATIENCE_S: Final = 3.0


class Leftovers:
    """Remembers what is in shared memory when it is made."""

    def __init__(self) -> None:
        self._before = _names()

    def faults(self, temporary: Path) -> list[str]:
        """What is there beyond that, and in use by no process, and what is in `temporary`."""
        deadline = time.monotonic() + _PATIENCE_S
        while (left := _unused(_names() - self._before)) and time.monotonic() < deadline:
            time.sleep(0.1)
        files = [
            entry.name for entry in temporary.iterdir() if not entry.name.startswith(_OF_TORCH)
        ]
        return [
            *([f"left in {_SHARED_MEMORY}: {sorted(left)}"] if left else []),
            *([f"left in its temporary folder: {sorted(files)}"] if files else []),
        ]


def _names() -> set[str]:
    return {entry.name for entry in _SHARED_MEMORY.iterdir()} if _SHARED_MEMORY.is_dir() else set()


def _unused(names: set[str]) -> set[str]:
    """Those that no process has mapped or open: other programs use the same folder."""
    left = set(names)
    for process in Path("/proc").glob("[0-9]*") if left else ():
        used = _used_by(process)
        left -= {name for name in left if f"{_SHARED_MEMORY}/{name}" in used}
    return left & _names()


def _used_by(process: Path) -> str:
    used = []
    # Processes and their files come and go, and those of others cannot be read.
    with suppress(OSError):
        used.append((process / "maps").read_text(errors="replace"))
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                used.append(os.readlink(link))
    return "\n".join(used)
