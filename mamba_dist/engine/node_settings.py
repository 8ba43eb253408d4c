"""What a node is set to before its ranks meet: threads, the network of gloo, Triton's cache.

The user's own settings always win. What is left out on purpose: NCCL finds its network by itself
and prefers the fast one, which the address of the meeting point need not be on; and torch's
defaults already abort a run whose NCCL collective fails (TORCH_NCCL_ASYNC_ERROR_HANDLING).
"""

import ipaddress
import os
import re
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from mamba_dist.engine.placement import Placement, Setting, started_by_srun
from mamba_dist.errors import EngineError

# File systems of other machines, as /proc/self/mountinfo calls them.
_NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "panfs", "wekafs"),
    *("pvfs2", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph-fuse", "fuse.gpfs", "fuse.juicefs"),
}
_SHOWN = re.compile(r"(TORCH_)?(NCCL|GLOO)_\w+|TORCH_DISTRIBUTED_DEBUG|CUDA_VISIBLE_DEVICES")


class Store(Protocol):
    """What ranks use of a torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until some rank has set it."""
        ...


def threads_of_rank(environment: Mapping[str, str], placement: Placement, *, cores: int) -> Setting:
    """Threads of a rank: OMP_NUM_THREADS as it is set, else its share of the `cores` it may run on.

    Without a limit each rank would take every core of the node; sharing is several times faster.
    """
    if "OMP_NUM_THREADS" in environment:
        return Setting("OMP_NUM_THREADS", environment["OMP_NUM_THREADS"], "was set")
    name, share = "threads", f"{cores} cores for {placement.local_size} ranks of this node"
    of_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if started_by_srun(environment) and of_task.isdigit() and int(of_task) > 0:
        # srun may have bound the task to its own cores, which nobody shares.
        return Setting(name, str(min(cores, int(of_task))), f"ours: {of_task} CPUs per SLURM task")
    return Setting(name, str(max(1, cores // placement.local_size)), f"ours: {share}")


def require_address(address: Setting, *, within_s: float = 20) -> None:
    """Returns once the host where the ranks meet has an address; torch would ask for ten minutes.

    Raises:
        EngineError: it has none for so long.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            socket.getaddrinfo(address.value, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{address} has no address on {socket.gethostname()} ({error}); export "
                    "MASTER_ADDR with a name or an address of the first rank's node that all nodes "
                    "can reach"
                ) from error
        time.sleep(0.5)


def interface_to_other_nodes(
    store: Store, placement: Placement, *, address: str, port: int
) -> str | None:
    """Name of the network interface that leads from here to ranks of other nodes, None if all
    ranks are on this one. Every rank must call it.

    gloo takes the address of the host's own name, which Debian writes into /etc/hosts as 127.0.1.1;
    the other nodes then connect to themselves. Where the meeting point, too, is such a name, its
    own node learns from the store who is somewhere else.
    """
    own = _local_address(address, port)
    store.set(f"address/{placement.rank}", own)
    if _is_loopback(own):
        others = (store.get(f"address/{r}").decode() for r in range(placement.world_size))
        elsewhere = next((other for other in others if not _is_loopback(other)), None)
        if elsewhere is None:
            return None
        own = _local_address(elsewhere, port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == own for a in addresses):
            return str(name)
    return None


def triton_cache(
    environment: Mapping[str, str], *, home: Path, local: Path, mounts: str
) -> Setting | None:
    """TRITON_CACHE_DIR in a folder of this node, None if Triton's own choice is as good.

    Triton compiles into the home directory. On a network file system that costs a round trip per
    file and kernel, for every rank of every node at once, and stale handles have crashed runs.

    Args:
        home: of the user.
        local: a folder on this node's own disk, for temporary files; nodes keep the cache there
            between jobs, as compiling anew takes minutes.
        mounts: the text of /proc/self/mountinfo.
    """
    if "TRITON_CACHE_DIR" in environment:
        return Setting("TRITON_CACHE_DIR", environment["TRITON_CACHE_DIR"], "was set")
    if "TRITON_HOME" in environment:
        return Setting("TRITON_HOME", environment["TRITON_HOME"], "was set")
    kind = _file_system(home, mounts)
    if kind not in _NETWORK_FILE_SYSTEMS or _file_system(local, mounts) in _NETWORK_FILE_SYSTEMS:
        return None
    folder = local / f"mamba-dist-{os.getuid()}"
    if not _is_ours_alone(folder):
        own = f"Triton's own, although {home} is on {kind}: {folder} cannot be made or is not safe"
        return Setting("TRITON_CACHE_DIR", str(home / ".triton" / "cache"), own)
    return Setting("TRITON_CACHE_DIR", str(folder / "triton"), f"ours: {home} is on {kind}")


def shown_variables(environment: Mapping[str, str], ours: Sequence[Setting]) -> list[Setting]:
    """What steers the communication, as it is set outside, without what is in `ours`."""
    names = {setting.name for setting in ours}
    return [
        Setting(name, value, "was set")
        for name, value in sorted(environment.items())
        if _SHOWN.fullmatch(name) and name not in names
    ]


def ranks_by_host(hosts: Sequence[str]) -> str:
    """Which ranks run where, as `n1 0-7, n2 8-15`; `hosts` are those of the ranks, in order."""
    parts, begin = [], 0
    for rank, host in enumerate(hosts):
        if rank + 1 == len(hosts) or hosts[rank + 1] != host:
            parts.append(f"{host} {begin}" + (f"-{rank}" if rank > begin else ""))
            begin = rank + 1
    return ", ".join(parts)


def _is_ours_alone(folder: Path) -> bool:
    """Makes a folder in which nobody else can write, who could have this user run code of theirs;
    False if that cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    others_write = found.st_mode & 0o022
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_write


def _local_address(address: str, port: int) -> str:
    """The address from which packets to another one leave; nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, which need not exist."""
    inside: list[tuple[int, str]] = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(point):
            inside.append((len(point), after.split()[0]))
    # A later mount of the same folder hides the earlier one.
    return max(reversed(inside), key=lambda found: found[0], default=(0, ""))[1]
