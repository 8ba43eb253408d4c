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
_VARIABLES: Final = (_TORCHRUN_VARIABLE, _DEEPSPEED_VARIABLE)
_TORCHRUN_WORDS: Final = ("torchrun", "torch.distributed.run")
_DEEPSPEED_WORD: Final = "deepspeed.launcher.launch"
_DEEPSPEED_COMMANDS: Final = ("deepspeed", "deepspeed.launcher.runner")
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
    no launcher to outlive, nor one whose launcher is outside of its container.
    """
    variable = next((v for v in _VARIABLES if v in environment), None)
    if "RANK" not in environment or variable is None or _is_in_outermost(variable):
        return ()
    if _TORCHRUN_VARIABLE in environment:
        # Other programs start ranks by torchrun's library; they are Python too.
        return (_nearest(*_TORCHRUN_WORDS) or _nearest("python"),)
    inner = _nearest(_DEEPSPEED_WORD)
    if inner == GONE:
        return (GONE,)
    outer = _parent_of(inner)
    if any(Path(word).name in _DEEPSPEED_COMMANDS for word in _words(outer)):
        return (inner, outer)
    return (inner, GONE) if _is_left_behind(inner, outer) else (inner,)


def _is_left_behind(inner: int, outer: int) -> bool:
    """Whether the `deepspeed` command started launch.py, and `outer` took it over.

    The command leaves launch.py in its own group of processes. Who starts it by hand, or by ssh for
    one of several nodes, gives it a group or is there, in the same session. A container's first
    process that takes launch.py over within its own session cannot be told from such a script.
    """
    if any(word.startswith("--node_rank") for word in _words(inner)):
        return False
    with suppress(OSError):
        in_other_group = os.getpgid(inner) not in (inner, os.getpgid(outer))
        return in_other_group and os.getsid(inner) != os.getsid(outer)
    return False


def _is_in_outermost(variable: str) -> bool:
    """Whether the process around all others here has it: a launcher outside started that one."""
    *_, outermost = (os.getpid(), *_ancestors())
    with suppress(OSError):
        start = f"{variable}=".encode()
        words = Path(f"/proc/{outermost}/environ").read_bytes().split(b"\0")
        return any(word.startswith(start) for word in words)
    return False


def _nearest(*words: str) -> int:
    """The closest ancestor with one of the words in its command line, or GONE."""
    told = ((pid, " ".join(_words(pid))) for pid in _ancestors())
    return next((pid for pid, line in told if any(word in line for word in words)), GONE)


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 0:
        yield pid
        pid = _parent_of(pid)


def _words(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _parent_of(pid: int) -> int:
    with suppress(OSError):
        # The command name, in brackets, may hold spaces; the fields after it do not.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return GONE
