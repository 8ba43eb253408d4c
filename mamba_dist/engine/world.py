"""The ranks of a run: start, agree on small facts, stop.

This is the only module of the package that reads and sets the process's environment. A plain
`python` start is a world of one; what `deepspeed`, `torchrun` and `srun` say is read by
placement.py, and what else a node needs is chosen by node_settings.py.
"""

import hashlib
import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from mamba_dist.engine.host_memory import give_back_freed_memory, keep_freed_memory
from mamba_dist.engine.launcher import Launch, launch_of, processes_to_outlive
from mamba_dist.engine.node_settings import (
    interface_to_other_nodes,
    ranks_by_host,
    require_address,
    shown_variables,
    threads_of_rank,
    triton_cache,
)
from mamba_dist.engine.placement import (
    Placement,
    Setting,
    meeting_point,
    placement_from_environment,
)
from mamba_dist.errors import EngineError, MambaDistError

_SHM_OP = "deepspeed_shm_comm"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class World:
    """All ranks of a run, with the few things they must agree on outside of the engine."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.rank = placement.rank
        self.size = placement.world_size
        self.local_rank = placement.local_rank
        self.local_size = placement.local_size
        self.device = device
        self.account: tuple[str, ...] = ()
        """How the run was started, as lines for its log."""

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

    def texts_of_all_ranks(self, text: str) -> list[str]:
        """The text of each rank, by rank; short ones, since every rank receives all."""
        if self.size == 1:
            return [text]
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, text)
        return [str(each) for each in found]

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

    def describe(self, settings: Sequence[Setting]) -> None:
        """Keeps the lines that say who takes part, and what is set by whom; all ranks call it."""
        hosts = [socket.gethostname()] * self.size
        if self.size > 1:
            dist.all_gather_object(hosts, socket.gethostname())
        self.account = (
            f"{self.size} ranks on {len(set(hosts))} hosts: {ranks_by_host(hosts)}",
            "environment: " + ", ".join(map(str, settings)),
        )

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.any_rank(False)


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
    settings = _prepare_node(placement, device)
    if deterministic:
        _fix_orders()
    for name, value in {
        "RANK": placement.rank,
        "WORLD_SIZE": placement.world_size,
        "LOCAL_RANK": placement.local_rank,
    }.items():
        os.environ[name] = str(value)
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
    timeout = timedelta(minutes=timeout_minutes)
    # ZeRO's collectives run in a copy of the world's group, FSDP2's in one of a mesh; both are made
    # without a word about their timeout.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    if device.type == "cpu" and placement.world_size > placement.local_size:
        settings += _meet_on_gloo(placement, timeout)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
    )
    world = World(placement, device)
    settings.append(Setting("timeout_minutes", f"{timeout_minutes:g}", "engine.timeout_minutes"))
    world.describe(settings)
    return world


def _prepare_node(placement: Placement, device: torch.device) -> list[Setting]:
    """Sets what must stand before the ranks meet, and says what is in force."""
    settings = [*meeting_point(os.environ, placement, free_port=_free_port())]
    require_address(settings[0])
    threads = threads_of_rank(os.environ, placement, cores=len(os.sched_getaffinity(0)))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(threads.value))
    if device.type == "cpu":
        keep_freed_memory(os.environ)
    else:
        mounts = Path("/proc/self/mountinfo").read_text()
        local = Path(tempfile.gettempdir())
        cache = triton_cache(os.environ, home=Path.home(), local=local, mounts=mounts)
        settings += [cache] if cache is not None else []
    for setting in settings:
        os.environ[setting.name] = setting.value
    settings.append(threads)
    return settings + shown_variables(os.environ, settings)


def _meet_on_gloo(placement: Placement, timeout: timedelta) -> list[Setting]:
    """Connects ranks on several nodes by the network that leads from one to the other."""
    rank, size = placement.rank, placement.world_size
    store, _, _ = next(rendezvous("env://", rank=rank, world_size=size, timeout=timeout))
    store.set_timeout(timeout)
    settings = []
    if _GLOO_INTERFACE not in os.environ:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        name = interface_to_other_nodes(store, placement, address=address, port=port)
        if name is not None:
            os.environ[_GLOO_INTERFACE] = name
            settings.append(Setting(_GLOO_INTERFACE, name, "ours: leads to the other nodes"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return settings


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
    """See `processes_to_outlive`."""
    return processes_to_outlive(os.environ)


def how_launched() -> Launch:
    """See `launch_of`."""
    return launch_of(os.environ)


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
