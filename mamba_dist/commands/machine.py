"""What a measurement or a check was made on: processor, memory, versions."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

# What kernels and matrix products choose by.
_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Machine:
    """This machine, as far as it tells."""

    processor: str
    flags: tuple[str, ...]
    cores: int
    memory_gib: float
    system: str
    python: str

    def __str__(self) -> str:
        return (
            f"{self.cores} cores of {self.processor} ({' '.join(self.flags) or 'flags unknown'}), "
            f"{self.memory_gib:.0f} GiB, {self.system}, Python {self.python}"
        )


def this_machine() -> Machine:
    """The machine that this process runs on."""
    info = _cpu_info()
    present = (info.get("flags") or info.get("Features") or "").split()
    return Machine(
        processor=info.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in _FLAGS if flag in present),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB,
        system=_system(),
        python=platform.python_version(),
    )


def package_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it; None if it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text(errors="replace").split("\n\n", 1)[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        name = None
    return name or f"{platform.system()} {platform.release()}"
