"""The processes that started this rank: which launcher it is, and whether it is still there.

torchrun starts the ranks itself. The `deepspeed` command starts one launch.py per node, which
starts them, and a SIGTERM to the command reaches neither.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# torchrun's and launch.py's own, by which a rank knows them when they are gone.
_TORCHRUN_VARIABLE: Final = "TORCHELASTIC_RUN_ID"
_DEEPSPEED_VARIABLE: Final = "CROSS_RANK"
_TORCHRUN_WORDS: Final = ("torchrun", "torch.distributed.run")
_DEEPSPEED_WORD: Final = "deepspeed.launcher.launch"
GONE: Final = 0
"""Stands for a process that is no more; no process has it."""


@dataclass(frozen=True)
class Launch:
    """What started this process, for a person who looks for its job later."""

    launcher: str
    job: str | None
    """SLURM's number of it."""


def launch_of(environment: Mapping[str, str]) -> Launch:
    """The launcher of a rank with this environment."""
    if _TORCHRUN_VARIABLE in environment:
        launcher = "torchrun"
    elif _DEEPSPEED_VARIABLE in environment:
        launcher = "deepspeed"
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        launcher = "srun"
    else:
        launcher = "python"
    return Launch(launcher, environment.get("SLURM_JOB_ID"))


def processes_to_outlive(environment: Mapping[str, str]) -> tuple[int, ...]:
    """Processes without which this rank is an orphan: the launcher's, outermost last.

    GONE is among them if one has died before this was asked. A rank that anything else started has
    no launcher to outlive.
    """
    if _TORCHRUN_VARIABLE in environment:
        # Other programs start ranks by torchrun's library; they are Python too, and no init is.
        return (_nearest(*_TORCHRUN_WORDS) or _nearest("python"),)
    if _DEEPSPEED_VARIABLE not in environment:
        return ()
    inner = _nearest(_DEEPSPEED_WORD)
    if inner == GONE:
        return (GONE,)
    outer = _parent_of(inner)
    if "deepspeed" in _command_line(outer):
        return (inner, outer)
    # Somebody may have started launch.py by hand, or by ssh: then it has a group of processes of
    # its own, or that of its parent. The `deepspeed` command leaves it in its own group.
    group = _group_of(inner)
    left_behind = group not in (inner, _group_of(outer))
    return (inner, GONE) if left_behind else (inner,)


def _nearest(*words: str) -> int:
    """The closest ancestor with one of the words in its command line, or GONE."""
    return next((p for p in _ancestors() if any(w in _command_line(p) for w in words)), GONE)


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 0:
        yield pid
        pid = _parent_of(pid)


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    return ""


def _parent_of(pid: int) -> int:
    with suppress(OSError):
        # The command name, in brackets, may hold spaces; the fields after it do not.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return GONE


def _group_of(pid: int) -> int:
    with suppress(OSError):
        return os.getpgid(pid)
    return GONE
