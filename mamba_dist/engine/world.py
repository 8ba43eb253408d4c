"""The ranks of a run: start, agree on small facts, stop.

This is the only module of the package that reads the launcher's environment. A plain `python`
start is a world of one; `deepspeed`, `torchrun` and `srun` set the variables below.
"""

import hashlib
import logging
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mamba_dist.engine.host_memory import give_back_freed_memory, keep_freed_memory
from mamba_dist.errors import EngineError, MambaDistError

_SHM_OP = "deepspeed_shm_comm"
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True)
class Placement:
    """Which rank this process is: of all, and on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int = 1


class World:
    """All ranks of a run, with the few things they must agree on outside of the engine."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.rank = placement.rank
        self.size = placement.world_size
        self.local_rank = placement.local_rank
        self.local_size = placement.local_size
        self.device = device

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sums over all ranks; integers below 2**53 stay exact."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def from_all_ranks(self, value: float) -> list[float]:
        """The value of each rank, by rank; integers below 2**53 stay exact."""
        return self.sum_over_ranks([value if r == self.rank else 0.0 for r in range(self.size)])

    def from_first(self, values: Sequence[int]) -> list[int]:
        """Rank 0's integers, on all ranks, exact below 2**53; those of the others don't count."""
        own = list(values) if self.rank == 0 else []
        [count] = self.sum_over_ranks([len(own)])
        return [int(v) for v in self.sum_over_ranks(own or [0] * int(count))]

    def on_this_host(self) -> list[int]:
        """The ranks that share this rank's host and see its process ids, this one included."""
        names = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
        digest = hashlib.blake2b(names.encode(), digest_size=6).digest()
        hosts = self.from_all_ranks(int.from_bytes(digest, "big"))
        return [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]

    def sum_tokens_or_raise(self, tokens: int, fault: MambaDistError | None) -> int:
        """Tokens over all ranks, if none of them has a fault.

        Raises:
            MambaDistError: this rank's fault, or on the other ranks that some rank has one; so
                nobody waits in a collective for a rank that has left.
        """
        total, faults = self.sum_over_ranks([tokens, float(fault is not None)])
        if fault is not None:
            fault.of_one_rank = True
            raise fault
        if faults:
            raise EngineError("another rank could not go on; its own message says why")
        return int(total)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; the same answer on every rank."""
        return self.sum_over_ranks([1.0 if flag else 0.0])[0] > 0

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.any_rank(False)


def placement_from_environment(environment: Mapping[str, str]) -> Placement:
    """Rank, world size and local rank as the launcher set them.

    Knows the variables of torchrun and the DeepSpeed launcher (RANK, WORLD_SIZE, LOCAL_RANK), and
    those of srun (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID).

    Raises:
        EngineError: variables are missing, not integers, or contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
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
    # torchrun, the DeepSpeed launcher and srun each have a name of their own for it.
    on_node = [environment.get(name, "") for name in _LOCAL_SIZES]
    local_size = next((int(value) for value in on_node if value.isdigit()), 1)
    return Placement(rank=rank, world_size=size, local_rank=local, local_size=local_size)


def start_world(*, timeout_minutes: float, deterministic: bool = False) -> World:
    """The connected ranks of this run, on gloo for CPU and NCCL for CUDA.

    Args:
        timeout_minutes: a collective that takes longer ends the run.
        deterministic: torch, cuBLAS and our kernels add up in a fixed order, or refuse.

    Raises:
        EngineError: the launcher's environment is unusable or the ranks cannot meet.
    """
    placement = placement_from_environment(os.environ)
    device = _device(placement)
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take every core of the node; sharing them is several times faster.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // placement.local_size))
    if device.type == "cpu":
        keep_freed_memory(os.environ)
    if deterministic:
        _fix_orders()
    for name, value in {
        "RANK": placement.rank,
        "WORLD_SIZE": placement.world_size,
        "LOCAL_RANK": placement.local_rank,
    }.items():
        os.environ[name] = str(value)
    if placement.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise EngineError(
            f"{' and '.join(missing)} not set, and {placement.world_size} ranks must meet; "
            "export the first node's address and a free port"
        )
    # What DeepSpeed 0.19 logs below this level is its own set-up, and "OVERFLOW" for every step
    # that we drop; newer torch warns on each collective of the names that it calls.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )
    # DeepSpeed would compile a shared-memory all-reduce at first use. ZeRO never calls it; a kill
    # during that build leaves a lock on which every later start hangs, and each rank leaves 69 MB
    # in /dev/shm.
    deepspeed.ops.__compatible_ops__[_SHM_OP] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return World(placement, device)


def spare_memory() -> None:
    """Has a CPU rank give back what it frees at once, which takes time and saves memory."""
    give_back_freed_memory(os.environ)


def _fix_orders() -> None:
    # cuBLAS reads it when its first product is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # It would overwrite all memory that is reserved, to show reads of what nobody has written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def stop_world() -> None:
    """Leaves the process group, if one was started."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher_pids() -> tuple[int, ...]:
    """Processes without which this rank is an orphan: the launcher's, outermost last.

    torchrun starts the ranks itself; the `deepspeed` command starts one launch.py per node, which
    starts them, and a SIGTERM to the command reaches neither. A rank that anything else started
    has no launcher to outlive.
    """
    parent = os.getppid()
    command = _command_line(parent)
    if "torchrun" in command or "torch.distributed.run" in command:
        return (parent,)
    if "deepspeed.launcher.launch" not in command:
        return ()
    outer = _parent_of(parent)
    return (parent, outer) if "deepspeed" in _command_line(outer) else (parent,)


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
    return 0


def _device(placement: Placement) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if placement.local_rank >= devices:
        raise EngineError(
            f"local rank {placement.local_rank} has no GPU: this node shows {devices}; "
            "start as many ranks per node as it has GPUs"
        )
    torch.cuda.set_device(placement.local_rank)
    return torch.device("cuda", placement.local_rank)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
