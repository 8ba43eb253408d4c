"""What the host's kernel and control groups would still give to this process; needs no torch."""

from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What this process could still take without swapping, as the kernel and cgroups say."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = 1024 * int(fields["MemAvailable"].split()[0])
    group = _own_group()
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_CGROUPS):
            break
        available = min(available, _left_in(folder, default=available))
    return available


def _own_group() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    return _CGROUPS / own.strip("/")


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
