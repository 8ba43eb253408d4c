"""What a launcher's variables say: which rank a process is, and where the ranks meet.

`deepspeed` and `torchrun` say both by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
`srun` says the first only, by variables of its own; the ranks of a step then meet on its first
node, at a port that other jobs do not use.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mamba_dist.errors import EngineError

# Linux gives away ports from 32768 up; below 15000 lie most of those with a name.
_FIRST_PORT = 15000
_PORTS = 15000
# Steps of a job get neighbouring ports, and jobs that follow each other ports so far apart.
_STEPS_APART = 31


@dataclass(frozen=True)
class Placement:
    """Which rank this process is: of all, and on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int = 1


@dataclass(frozen=True)
class Setting:
    """A variable in force, and who has set it."""

    name: str
    value: str
    origin: str

    def __str__(self) -> str:
        return f"{self.name}={self.value} ({self.origin})"


def placement_from_environment(environment: Mapping[str, str]) -> Placement:
    """Rank, world size, local rank and local size as the launcher set them.

    Raises:
        EngineError: variables are missing, not integers, or contradict each other.
    """
    by_srun = started_by_srun(environment)
    if by_srun:
        # SLURM_NTASKS is the job's where the step is salloc's interactive shell, of one task.
        step_size = "SLURM_STEP_NUM_TASKS"
        size_name = step_size if step_size in environment else "SLURM_NTASKS"
        names = ("SLURM_PROCID", size_name, "SLURM_LOCALID")
    elif "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    else:
        return Placement(rank=0, world_size=1, local_rank=0)
    found = {name: environment.get(name) for name in names}
    if not all(value is not None and value.isdigit() for value in found.values()):
        raise EngineError(
            f"the launcher's variables are incomplete: found {found}, expected a number in each; "
            "start with deepspeed, torchrun, srun or plain python"
        )
    rank, size, local = (int(environment[name]) for name in names)
    if rank >= size:
        raise EngineError(f"{names[0]}={rank} must be below {names[1]}={size}")
    local_size = _tasks_on_this_node(environment) if by_srun else _started_here(environment)
    return Placement(rank=rank, world_size=size, local_rank=local, local_size=local_size)


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process is a task of srun's, not of a launcher that srun may have started."""
    # A batch script and salloc's shell have SLURM's variables, but no step.
    in_a_step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    return in_a_step and "RANK" not in environment and "WORLD_SIZE" not in environment


def meeting_point(
    environment: Mapping[str, str], placement: Placement, *, free_port: int
) -> tuple[Setting, Setting]:
    """MASTER_ADDR and MASTER_PORT: as they are set, else of the SLURM step, or of a single rank.

    Args:
        free_port: of this machine, for a world of one.

    Raises:
        EngineError: neither the variables nor a step say where several ranks meet.
    """
    if placement.world_size == 1:
        ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        origin = "ours: one rank"
    elif started_by_srun(environment):
        ours, origin = _meeting_of_step(environment), "ours: from the SLURM step"
    else:
        ours, origin = {}, ""
    names = ("MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment and name not in ours]
    if missing:
        raise EngineError(
            f"{' and '.join(missing)} not set, and {placement.world_size} ranks must meet; "
            "export the first node's address and a free port"
        )
    address, port = (
        Setting(name, environment[name], "was set")
        if name in environment
        else Setting(name, ours[name], origin)
        for name in names
    )
    return address, port


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `rack[1-2]n[03,05-07],x` begins with rack1n03."""
    in_brackets = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes)
    return in_brackets.split(",")[0]


def _meeting_of_step(environment: Mapping[str, str]) -> dict[str, str]:
    found = {}
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if nodes:
        found["MASTER_ADDR"] = first_host(nodes)
    job, step = environment.get("SLURM_JOB_ID", ""), environment["SLURM_STEP_ID"]
    if job.isdigit() and step.isdigit():
        found["MASTER_PORT"] = str(_FIRST_PORT + (_STEPS_APART * int(job) + int(step)) % _PORTS)
    return found


def _started_here(environment: Mapping[str, str]) -> int:
    """How many ranks torchrun or the DeepSpeed launcher starts on this node."""
    on_node = (environment.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    return next((int(value) for value in on_node if value.isdigit()), 1)


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """Of a step whose nodes may have different numbers of tasks, as in `8(x3),4`."""
    tasks, node = environment.get("SLURM_STEP_TASKS_PER_NODE"), environment.get("SLURM_NODEID", "")
    if tasks is None or not node.isdigit():
        # What was asked for; a srun that takes less of its job does not change it.
        asked = environment.get("SLURM_NTASKS_PER_NODE", "")
        return int(asked) if asked.isdigit() else 1
    by_node: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise EngineError(
                f"SLURM_STEP_TASKS_PER_NODE={tasks!r} is not understood; expected numbers like "
                "2(x3),1; start the ranks with srun"
            )
        by_node += [int(match[1])] * int(match[2] or 1)
    if int(node) >= len(by_node):
        raise EngineError(
            f"SLURM_NODEID={node} must be below the {len(by_node)} nodes of "
            f"SLURM_STEP_TASKS_PER_NODE={tasks}"
        )
    return by_node[int(node)]
