"""A real SLURM of one machine, in a folder of its own: two nodes, no accounting, no cgroups.

Where the kernel lets it, each node has a network, a host name and process ids of its own
(namespaces.py); elsewhere both are this machine on two ports. It needs root and the programs of
Debian's packages slurm-wlm and munge; nothing of an installed SLURM is read or changed.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from namespaces import Node, two_nodes, why_no_nodes
from processes import ROOT, clean_environment, free_port

_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "srun", "sinfo", "scontrol", "squeue", "scancel", "setpriv")
_NODES = ("n1", "n2")
_START_S = 30
# States of a job that has not ended.
GOING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}
_MUNGE_FILES = (
    ("socket", "socket"),
    ("key-file", "key"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
)

# cons_tres, so that jobs share a node; linuxproc and none, since cgroups need the machine's own
# set-up; the intervals, so that a job that may start does so within a second or two.
_CONFIG = """
ClusterName=tests
SlurmctldHost={host}({address})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller_port}
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
ReturnToService=2
SlurmdTimeout=60
SlurmdParameters=config_overrides
MinJobAge=300
KillWait=30
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 "
    "Gres=gpu:2 State=UNKNOWN"
)


def why_not() -> str | None:
    """Why a cluster cannot be started here, None if it can."""
    absent = [name for name in (*_DAEMONS, *_COMMANDS) if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return None


class LocalSlurm:
    """A running cluster; commands go to it by `environment`.

    `nodes` are its n1 and n2, none where both are this machine.
    """

    def __init__(self, folder: Path, nodes: Sequence[Node], daemons: ExitStack) -> None:
        self.folder = folder
        self.nodes = tuple(nodes)
        self._daemons = daemons
        self.environment = {**clean_environment(), "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str | Path) -> str:
        """What a command prints; it must not fail."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str | Path) -> str:
        """The id of a job submitted from the repository root; `words` are sbatch's."""
        return self.call("sbatch", "--parsable", *words)

    def states(self, job: str) -> set[str]:
        """The states of a job, of all its array tasks."""
        return set(self.call("squeue", "--jobs", job, "--states=all", "-h", "-o", "%T").split())

    def wait(self, *jobs: str, timeout_s: float = 100) -> dict[str, set[str]]:
        """The last states of jobs, once all have ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            states = {job: self.states(job) for job in jobs}
            if not any(found & GOING for found in states.values()):
                return states
            time.sleep(0.2)
        raise AssertionError(f"jobs still wait or run: {states}\n{self.call('squeue')}")

    def start_daemon(self, name: str, *words: str, node: Node | None = None) -> None:
        """Starts a daemon of the cluster, which runs until the cluster ends."""
        self._daemons.enter_context(_daemon(self, name, *words, node=node))

    def restart(self, node: Node) -> None:
        """Brings a node back that has failed."""
        node.join()
        self.start_daemon("slurmd", "-D", "-N", node.name, node=node)

    def start_soon(self, job: str) -> None:
        """Lets a requeued job begin in two seconds; by itself SLURM makes it wait for two minutes.

        Not at once: a start in the second of the requeue is refused as "credential revoked".
        """
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now+2seconds")


@contextmanager
def local_slurm(folder: Path) -> Iterator[LocalSlurm]:
    """A cluster that runs while the block lasts; `folder` is new, its path short (a socket's)."""
    with ExitStack() as stack:
        own, nodes = "127.0.0.1", list[Node]()
        if why_no_nodes() is None:
            own, nodes = stack.enter_context(two_nodes(folder))
        _configure(folder, own, nodes)
        cluster = LocalSlurm(folder, nodes, stack)
        munge = [f"--{name}={folder}/munge.{end}" for name, end in _MUNGE_FILES]
        cluster.start_daemon("munged", "--foreground", "--force", *munge)
        _wait_until(lambda: (folder / "munge.socket").exists(), cluster)
        cluster.start_daemon("slurmctld", "-D")
        for name, node in zip(_NODES, nodes or (None, None), strict=True):
            cluster.start_daemon("slurmd", "-D", "-N", name, node=node)
        _wait_until(lambda: _idle_nodes(cluster) == 2, cluster)
        try:
            yield cluster
        finally:
            # What a failed test left running would outlive the daemons.
            cluster.call("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            cluster.call("scancel", "--user", getpass.getuser())


def _configure(folder: Path, own: str, nodes: Sequence[Node]) -> None:
    """Writes the files of a cluster whose controller has the address `own`."""
    (folder / "state").mkdir()
    host, cpus = socket.gethostname().split(".")[0], len(os.sched_getaffinity(0))
    places = [(node.name, node.address) for node in nodes] or [(host, own)] * 2
    lines = [
        _NODE.format(name=name, host=host, address=address, port=free_port(), cpus=cpus)
        for name, (host, address) in zip(_NODES, places, strict=True)
    ]
    config = _CONFIG.format(
        folder=folder,
        host=host,
        address=own,
        user=getpass.getuser(),
        controller_port=free_port(),
        # Ports of jobs follow from their ids: those of two clusters on one machine must differ.
        first_job=1000 + os.getpid() % 13000,
        nodes="\n".join(lines),
    )
    (folder / "slurm.conf").write_text(config)
    # GPUs that are counted and given out; a device file must stand behind each, any.
    gpus = [f"NodeName=n[1-2] Name=gpu File=/dev/{name}\n" for name in ("null", "zero")]
    (folder / "gres.conf").write_text("".join(gpus))
    # Named, or slurmd would not start where it finds none, or two kinds of them; it uses none.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def _daemon(
    cluster: LocalSlurm, name: str, *words: str, node: Node | None = None
) -> Iterator[None]:
    program = _program(name)
    assert program is not None
    # It ends with this process, whatever ends that.
    bound = ["setpriv", "--pdeathsig", "TERM", program, *words]
    command = bound if node is None else node.inside(program, *words)
    with (cluster.folder / f"{name}.out").open("ab") as output:
        daemon = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait(20)


def _idle_nodes(cluster: LocalSlurm) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-t", "idle", "-o", "%D"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def _wait_until(condition: Callable[[], bool], cluster: LocalSlurm) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            logs = [path.read_text()[-1000:] for path in sorted(cluster.folder.glob("*.out"))]
            raise AssertionError("the cluster does not start:\n" + "\n".join(logs))
        time.sleep(0.1)
