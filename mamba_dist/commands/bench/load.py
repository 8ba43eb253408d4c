"""How busy the machine is with other things than the benchmark, from Linux's /proc."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# user, nice, system, irq, softirq, steal: the fields of "cpu" that are neither idle nor guest.
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU time at an instant: of the whole machine, and of the benchmark's processes."""

    at_s: float
    machine_s: float
    own_s: float


def cpu_times(pids: Sequence[int]) -> CpuTimes:
    """Now, with `pids` as the processes that are not other load."""
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    machine = sum(int(fields[i]) for i in _BUSY_FIELDS if i < len(fields))
    own = sum(_process_ticks(pid) for pid in {*pids, os.getpid()})
    return CpuTimes(time.monotonic(), machine / ticks_per_s, own / ticks_per_s)


def other_load_cores(before: CpuTimes, after: CpuTimes) -> float:
    """Cores that other processes kept busy in between, on average."""
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    busy_s = (after.machine_s - before.machine_s) - (after.own_s - before.own_s)
    return max(0.0, busy_s / elapsed_s)


def _process_ticks(pid: int) -> int:
    with suppress(OSError):
        # The command name, in brackets, may hold spaces; utime and stime are fields 14 and 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0
