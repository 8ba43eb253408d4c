"""What the host's kernel and control groups would still give to this process; needs no torch."""

from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
# What counts as a group's memory, and is given up on demand: the page cache, read once or more
# often, and what the kernel keeps of files.
_GIVEN_UP: Final = ("inactive_file", "active_file", "slab_reclaimable")


def available_bytes() -> int:
    """What this process could still take without swapping, as the kernel and cgroups (v2) say."""
    available = _of_host("MemAvailable")
    return min([available, *(_left_in(group, default=available) for group in _own_groups())])


def capacity_bytes() -> int:
    """What this process could take if nothing else ran: the host's memory, or its cgroups' (v2)."""
    memory = _of_host("MemTotal")
    return min([memory, *(_limit_of(group) or memory for group in _own_groups())])


def _of_host(name: str) -> int:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    return 1024 * int(fields[name].split()[0])


def _own_groups() -> list[Path]:
    """The own group and all around it."""
    own = _own_group()
    return [group for group in (own, *own.parents) if group.is_relative_to(_CGROUPS)]


def _own_group() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    return _CGROUPS / own.strip("/")


def _limit_of(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit)


def _left_in(group: Path, *, default: int) -> int:
    limit = _limit_of(group)
    if limit is None:
        return default
    try:
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return default
    return max(0, limit - used + sum(int(statistics.get(name, 0)) for name in _GIVEN_UP))
