"""Two nodes of one machine: each with a network, a host name and process ids of its own.

A node is the first process of a set of Linux namespaces. Nothing of it outlives that process, which
dies with this one: no interface, no mount, no daemon. As on a cluster, the files are shared and a
process sees and signals those of its own node only. As Debian installs it, a node's own name
stands in its /etc/hosts as 127.0.1.1, where no other node can reach it.

    this machine  mdPID ------- eth0 (a bridge)  n1
                                  |
                                  +-------- eth0 n2
"""

import ipaddress
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

_START_S = 20
# For tests of networks (RFC 2544), so that it is nobody's.
_NETWORK = ipaddress.ip_network("198.18.0.0/15")
_ADDRESSES_EACH = 8
_PREFIX = 29

_UNSHARE = "setpriv --pdeathsig KILL unshare --net --uts --mount --pid --fork --kill-child"
_BECOME_A_NODE = """
set -e
hostname "$1"
mount --bind "$2/hosts.$1" /etc/hosts
if [ -e /etc/ssh/ssh_config ]; then mount --bind "$2/ssh_config" /etc/ssh/ssh_config; fi
# Nobody in here answers for names; without a server to ask, no look-up waits for an answer.
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
touch "$2/$1.is-up"
exec sleep infinity
"""


@dataclass(frozen=True)
class Node:
    """A running node; `pid` is its first process, seen from outside."""

    name: str
    address: str
    pid: int

    def inside(self, *command: str | Path) -> list[str]:
        """The command line that runs `command` on this node, in the repository's root."""
        enter = f"nsenter --target {self.pid} --net --uts --mount --pid --root"
        return [*enter.split(), "--", "env", f"--chdir={ROOT}", *map(str, command)]

    def processes(self) -> dict[int, list[str]]:
        """Of this node: their ids out here, and their words."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {
            int(entry.name): _read(entry / "cmdline").decode(errors="replace").split("\0")[:-1]
            for entry in Path("/proc").glob("[0-9]*")
            if _link(entry / "ns/pid") == own
        }
        # Those that have ended and wait for their parent have no words any more.
        return {pid: words for pid, words in found.items() if words}

    def fail(self) -> None:
        """As without power: nobody hears of it again, and nothing of it goes on."""
        # Not the link: that of n1 carries what n2 says, too.
        subprocess.run(self.inside("ip", "address", "flush", "eth0"), check=True, timeout=20)
        for pid in self.processes():
            # A process of its own can have ended meanwhile.
            if pid != self.pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def join(self) -> None:
        """Is on the network again, after `fail`."""
        words = f"ip address add {self.address}/{_PREFIX} dev eth0".split()
        subprocess.run(self.inside(*words), check=True, timeout=20)

    def pid_of(self, program: str | Path) -> int:
        """The id, out here, of the one process whose first or second word is `program`."""
        found = [pid for pid, words in self.processes().items() if str(program) in words[:2]]
        assert len(found) == 1, f"{program} runs {len(found)} times on {self.name}"
        return found[0]


def why_no_nodes() -> str | None:
    """Why no nodes can be made here, None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "setpriv", "unshare", "nsenter") if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2, util-linux)"
    trial = (
        "mount -t tmpfs tmpfs /run && ip link add eth0 type bridge && "
        "ip link add port1 type veth && hostname n1"
    )
    done = subprocess.run(
        [*_UNSHARE.split(), "--mount-proc", "sh", "-c", trial], capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    return f"no network namespaces here: {done.stderr.strip()}"


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, list[Node]]]:
    """This machine's address, and n1 and n2, while the block lasts; `folder` is for their files."""
    number = os.getpid() % (_NETWORK.num_addresses // _ADDRESSES_EACH)
    here, *there = (str(_NETWORK[number * _ADDRESSES_EACH + host]) for host in (1, 2, 3))
    addresses = dict(zip(("n1", "n2"), there, strict=True))
    _write_ssh_config(folder)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        nodes = []
        for name, address in addresses.items():
            _write_hosts(folder / f"hosts.{name}", name, addresses)
            begin = [*_UNSHARE.split(), "--mount-proc", "sh", "-c", _BECOME_A_NODE]
            process = subprocess.Popen([*begin, "sh", name, str(folder)], cwd="/")
            processes.append(process)
            nodes.append(Node(name, address, _first_process(process, folder / f"{name}.is-up")))
        _connect(here, nodes)
        yield here, nodes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def start_ssh_servers(nodes: Sequence[Node], folder: Path) -> None:
    """Lets root of either node reach the other by ssh, until the nodes end; of their `folder`."""
    config = folder / "sshd_config"
    config.write_text(
        f"HostKey {folder}/key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nLogLevel ERROR\n"
    )
    server = _program("sshd")
    assert server is not None
    for node in nodes:
        subprocess.run(node.inside(server, "-f", config), check=True, timeout=20)
        subprocess.run(nodes[0].inside("ssh", node.name, "true"), check=True, timeout=20)


def why_no_ssh() -> str | None:
    """Why DeepSpeed cannot reach other nodes by ssh here, None if it can."""
    needed = ("sshd", "ssh", "ssh-keygen", "pdsh", "pkill")
    absent = [name for name in needed if _program(name) is None]
    packages = "openssh-server, pdsh, procps"
    return f"{', '.join(absent)} not installed (Debian: {packages})" if absent else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _write_hosts(path: Path, own: str, addresses: Mapping[str, str]) -> None:
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {own}"]
    lines += [f"{address} {name}" for name, address in addresses.items() if name != own]
    path.write_text("\n".join(lines) + "\n")


def _write_ssh_config(folder: Path) -> None:
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder}/key\nStrictHostKeyChecking no\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\nBatchMode yes\n"
    )
    if _program("ssh-keygen") is not None:
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
        subprocess.run(make, check=True)


def _first_process(process: "subprocess.Popen[bytes]", is_up: Path) -> int:
    _wait_until(is_up.exists, f"a node: {process.args!r}")
    [pid] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(pid)


def _connect(here: str, nodes: Sequence[Node]) -> None:
    first, second = nodes
    outside = f"md{os.getpid()}"
    # Their networks only, since a namespace is named by a process id of out here.
    in_first, in_second = (["nsenter", "--target", str(n.pid), "--net"] for n in nodes)
    for place, words in (
        ([], f"add {outside} type veth peer name port1 netns {first.pid}"),
        (in_first, "add eth0 type bridge"),
        (in_first, f"add port2 type veth peer name eth0 netns {second.pid}"),
        (in_first, "set port1 master eth0 up"),
        (in_first, "set port2 master eth0 up"),
    ):
        subprocess.run([*place, "ip", "link", *words.split()], check=True, timeout=20)
    for place, name, address in (
        ([], outside, here),
        (in_first, "eth0", first.address),
        (in_second, "eth0", second.address),
    ):
        for words in (f"address add {address}/{_PREFIX} dev {name}", f"link set {name} up"):
            subprocess.run([*place, "ip", *words.split()], check=True, timeout=20)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {_START_S} s in vain for {what}"
        time.sleep(0.02)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
