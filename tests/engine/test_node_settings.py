"""What a node is set to before its ranks meet, and what is left to the user."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from mamba_dist.engine import node_settings
from mamba_dist.engine.node_settings import (
    interface_to_other_nodes,
    ranks_by_host,
    require_address,
    shown_variables,
    threads_of_rank,
    triton_cache,
)
from mamba_dist.engine.placement import Placement, Setting
from mamba_dist.errors import EngineError

FOUR = Placement(rank=0, world_size=8, local_rank=0, local_size=4)
TASK = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "3"}


@pytest.mark.parametrize(
    ("environment", "cores", "threads"),
    [
        ({}, 16, "4"),
        ({}, 2, "1"),
        ({"OMP_NUM_THREADS": "7"}, 16, "7"),
        # srun has bound the task to its three CPUs, or has left it the whole node.
        (TASK, 3, "3"),
        (TASK, 16, "3"),
        # sbatch's --cpus-per-task, which srun does not take over.
        (TASK, 1, "1"),
        # Of a launcher's, not of a rank's.
        ({**TASK, "RANK": "0", "WORLD_SIZE": "8"}, 16, "4"),
    ],
)
def test_a_rank_takes_its_share_of_the_cores(
    environment: dict[str, str], cores: int, threads: str
) -> None:
    assert threads_of_rank(environment, FOUR, cores=cores).value == threads


def test_a_meeting_point_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[OSError | None] = [socket.gaierror(socket.EAI_AGAIN, "later"), None]

    def look_up(host: str, port: None) -> None:
        answer = answers.pop(0) if answers else socket.gaierror(socket.EAI_NONAME, "unknown")
        if answer is not None:
            raise answer

    monkeypatch.setattr(node_settings.socket, "getaddrinfo", look_up)
    wanted = Setting("MASTER_ADDR", "n1", "ours: from the SLURM step")
    require_address(wanted)
    assert not answers
    with pytest.raises(EngineError, match=r"^MASTER_ADDR=n1 \(ours: from the SLURM step\) has no"):
        require_address(wanted, within_s=0)


class RanksBefore:
    """A store in which all other ranks have left their addresses already."""

    def __init__(self, *addresses: str) -> None:
        self.keys = {f"address/{rank}": address for rank, address in enumerate(addresses)}

    def set(self, key: str, value: str) -> None:
        self.keys[key] = value

    def get(self, key: str) -> bytes:
        return self.keys[key].encode()


@pytest.fixture
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that reaches 10.0.0.* by ib0 and all else by eth0."""
    interfaces = {"lo": "127.0.0.1", "eth0": "192.0.2.1", "ib0": "10.0.0.1"}
    found = {name: [SimpleNamespace(address=own)] for name, own in interfaces.items()}
    monkeypatch.setattr(node_settings.psutil, "net_if_addrs", lambda: found)

    def leaves_by(address: str, port: int) -> str:
        if address.startswith("127."):
            return "127.0.0.1"
        return "10.0.0.1" if address.startswith("10.0.0.") else "192.0.2.1"

    monkeypatch.setattr(node_settings, "_local_address", leaves_by)


@pytest.mark.usefixtures("two_networks")
def test_gloo_takes_the_network_of_the_meeting_point() -> None:
    store = RanksBefore("", "10.0.0.2")
    for address, interface in (("10.0.0.9", "ib0"), ("192.0.2.9", "eth0")):
        assert interface_to_other_nodes(store, FOUR, address=address, port=1) == interface
    assert store.keys["address/0"] == "192.0.2.1"


@pytest.mark.usefixtures("two_networks")
def test_where_the_meeting_point_is_this_host_the_other_nodes_show_the_network() -> None:
    # Debian's own name of the host; ranks 0 and 1 are on it.
    store = RanksBefore("", "127.0.0.1", "10.0.0.2", "10.0.0.2")
    assert interface_to_other_nodes(store, FOUR, address="127.0.1.1", port=1) == "ib0"


@pytest.mark.usefixtures("two_networks")
def test_ranks_of_one_host_keep_what_gloo_takes() -> None:
    here = Placement(rank=0, world_size=2, local_rank=0)
    store = RanksBefore("", "127.0.0.1")
    assert interface_to_other_nodes(store, here, address="127.0.0.1", port=1) is None


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / {home} rw - ext4 /dev/sdb1 rw
31 22 0:41 / {home} rw,relatime shared:9 - {kind} server:/home rw
"""


def cache(tmp_path: Path, environment: dict[str, str], *, kind: str = "nfs4") -> Setting | None:
    home = tmp_path / "home"
    mounts = MOUNTS.format(home=home, kind=kind)
    local = tmp_path / "local"
    return triton_cache(environment, home=home / "me", local=local, mounts=mounts)


def test_triton_compiles_on_the_nodes_own_disk_if_the_home_directory_is_elsewhere(
    tmp_path: Path,
) -> None:
    found = cache(tmp_path, {})
    assert found is not None
    folder = tmp_path / "local" / f"mamba-dist-{os.getuid()}"
    assert found.name == "TRITON_CACHE_DIR"
    assert found.value == str(folder / "triton")
    assert "is on nfs4" in found.origin
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache(tmp_path, {}) == found


@pytest.mark.parametrize("kind", ["ext4", "xfs", "overlay"])
def test_triton_compiles_in_a_home_directory_of_this_machine(tmp_path: Path, kind: str) -> None:
    assert cache(tmp_path, {}, kind=kind) is None
    assert not (tmp_path / "local").exists()


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_a_cache_that_the_user_has_set_is_left_alone(tmp_path: Path, name: str) -> None:
    assert cache(tmp_path, {name: "/mine"}) == Setting(name, "/mine", "was set")


def test_triton_never_compiles_where_others_can_write(tmp_path: Path) -> None:
    folder = tmp_path / "local" / f"mamba-dist-{os.getuid()}"
    folder.parent.mkdir()

    def refused() -> bool:
        found = cache(tmp_path, {})
        assert found is not None
        return "not safe" in found.origin and found.value.startswith(str(tmp_path / "home"))

    folder.touch()
    assert refused()
    folder.unlink()
    folder.symlink_to(tmp_path)
    assert refused()
    folder.unlink()
    folder.mkdir()
    assert not refused()
    folder.chmod(0o777)
    assert refused()


def test_what_steers_the_communication_is_shown_once() -> None:
    environment = {
        "NCCL_DEBUG": "INFO",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HOME": "/root",
    }
    ours = [Setting("GLOO_SOCKET_IFNAME", "eth0", "ours")]
    names = [setting.name for setting in shown_variables(environment, ours)]
    assert names == ["NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT"]


def test_ranks_are_told_by_host() -> None:
    assert ranks_by_host(["n1"] * 4 + ["n2"] * 4) == "n1 0-3, n2 4-7"
    assert ranks_by_host(["n1", "n2", "n1"]) == "n1 0, n2 1, n1 2"
