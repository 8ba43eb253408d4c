"""Ranks on two nodes that share nothing but files: the same run by every launcher.

The nodes are namespaces of this machine (namespaces.py), so that what one rank tells another really
crosses a network, and a process of one node is out of reach of the other.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import BIN, TRAIN, finish, torchrun_command, wait_until, write_config
from local_slurm import LocalSlurm
from namespaces import Node, start_ssh_servers, why_no_nodes, why_no_ssh
from processes import clean_environment

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.telemetry.metrics import read_metrics

SCRIPT = "launch/slurm/train.sbatch"
SMALL = {"d_model": 32, "n_layers": 1}
TIMEOUT_S = 240


@pytest.fixture(scope="session")
def nodes(slurm: LocalSlurm) -> tuple[Node, Node]:
    """n1 and n2 of the cluster, each with a network of its own."""
    if not slurm.nodes:
        pytest.skip(str(why_no_nodes()))
    first, second = slurm.nodes
    return first, second


@pytest.fixture(scope="session")
def ssh(slurm: LocalSlurm, nodes: tuple[Node, Node]) -> None:
    """Either node reaches the other by ssh."""
    reason = why_no_ssh()
    if reason is not None:
        pytest.skip(reason)
    start_ssh_servers(nodes, slurm.folder)


def config_in(folder: Path, made: Path, *, steps: int = 3) -> Path:
    return write_config(
        folder,
        made,
        model=SMALL,
        training={"max_steps": steps, "eval_steps": None},
        checkpoint={"save_steps": steps},
    )


@pytest.fixture(scope="module")
def one_node(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one node: the truth for all others."""
    folder = tmp_path_factory.mktemp("one")
    result = finish(torchrun_command(config_in(folder, tiny_data)), timeout_s=TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 ranks on 1 hosts: " in result.stderr
    return folder / "run"


def losses(run_dir: Path) -> dict[float | None, float | None]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if "loss" in r}


def state(run_dir: Path, step: int) -> set[tuple[object, ...]]:
    """Identity of parameters and moments, bit for bit."""
    fragments = read_manifest(checkpoint_folder(run_dir, step)).fragments
    return {
        (f.name, f.start, f.numel, f.master_sha256, f.exp_avg_sha256, f.exp_avg_sq_sha256)
        for f in fragments
    }


def require_same(run_dir: Path, truth: Path, log: str, *, step: int = 3) -> None:
    """The ranks were one on each node, and trained what two on one node do."""
    assert "2 ranks on 2 hosts: n1 0, n2 1" in log, log[-3000:]
    assert "GLOO_SOCKET_IFNAME=eth0 (ours: leads to the other nodes)" in log
    assert losses(run_dir) == losses(truth)
    assert len(losses(truth)) == step
    assert state(run_dir, step) == state(truth, step)


def on(node: Node, *command: str | Path, log: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """A command that runs on a node, both streams in a file."""
    with log.open("wb") as output:
        return subprocess.Popen(
            node.inside(*command),
            cwd="/",
            env={**clean_environment(), **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finished(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """What a command wrote; it must not fail."""
    try:
        status = process.wait(TIMEOUT_S)
    finally:
        process.kill()
    text = log.read_text()
    assert status == 0, text[-3000:]
    return text


def submit(slurm: LocalSlurm, log: Path, *words: str | Path) -> str:
    small = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    options = (f"--output={log}", "--mem=1000", "--time=30", *small)
    return slurm.submit(*options, f"--export=ALL,MAMBA_DIST_PYTHON={sys.executable}", *words)


def test_a_job_on_two_nodes_trains_what_one_node_does(
    slurm: LocalSlurm, nodes: tuple[Node, Node], one_node: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    job = submit(slurm, tmp_path / "log", SCRIPT, "--config", config)
    states = slurm.wait(job, timeout_s=TIMEOUT_S)
    log = (tmp_path / "log").read_text()
    assert states == {job: {"COMPLETED"}}, log[-3000:]
    require_same(tmp_path / "run", one_node, log)


@pytest.mark.slow
def test_a_bare_srun_needs_no_meeting_point(
    slurm: LocalSlurm, nodes: tuple[Node, Node], one_node: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    command = ["srun", "--nodes=2", "--ntasks=2", "--cpus-per-task=1", sys.executable, TRAIN]
    result = subprocess.run(
        [*command, "--config", config],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "MASTER_ADDR=n1 (ours: from the SLURM step)" in result.stderr
    require_same(tmp_path / "run", one_node, result.stderr)


@pytest.mark.slow
def test_torchrun_on_each_node_trains_what_one_node_does(
    nodes: tuple[Node, Node], one_node: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    logs = [tmp_path / "log-1", tmp_path / "log-2"]
    processes = [
        on(node, *torchrun(number), TRAIN, "--config", config, log=log)
        for number, (node, log) in enumerate(zip(nodes, logs, strict=True))
    ]
    texts = [finished(p, log) for p, log in zip(processes, logs, strict=True)]
    require_same(tmp_path / "run", one_node, texts[0])


def torchrun(number: int) -> list[str | Path]:
    shape = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}"]
    return [BIN / "torchrun", *shape, "--master-addr=n1", "--master-port=15001"]


@pytest.mark.slow
def test_torchrun_with_a_rendezvous_trains_what_one_node_does(
    nodes: tuple[Node, Node], one_node: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    logs = [tmp_path / "log-1", tmp_path / "log-2"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=n1:15002", "--rdzv-id=tests"]
    processes = [
        on(
            *(node, BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1", *meeting, TRAIN),
            *("--config", config),
            log=log,
        )
        for node, log in zip(nodes, logs, strict=True)
    ]
    texts = [finished(p, log) for p, log in zip(processes, logs, strict=True)]
    assert sorted("2 ranks on 2 hosts" in text for text in texts) == [False, True]
    assert losses(tmp_path / "run") == losses(one_node)


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("n1 slots=1\nn2 slots=1\n")
    # The only variables that DeepSpeed takes to the other nodes, but for PYTHONPATH and NCCL's.
    (tmp_path / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    return path


def deepspeed(hostfile: Path) -> list[str | Path]:
    return [BIN / "deepspeed", f"--hostfile={hostfile}", "--master_port=15003", TRAIN]


@pytest.mark.slow
def test_deepspeed_by_ssh_trains_what_one_node_does(
    nodes: tuple[Node, Node],
    ssh: None,
    hostfile: Path,
    one_node: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    config, log = config_in(tmp_path, tiny_data), tmp_path / "log"
    variables = {"DS_ENV_FILE": str(tmp_path / "deepspeed_env")}
    process = on(nodes[0], *deepspeed(hostfile), "--config", config, log=log, **variables)
    require_same(tmp_path / "run", one_node, finished(process, log))


@pytest.mark.slow
def test_deepspeed_by_srun_trains_what_one_node_does(
    slurm: LocalSlurm,
    nodes: tuple[Node, Node],
    hostfile: Path,
    one_node: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    config = config_in(tmp_path, tiny_data)
    start = [str(BIN / "deepspeed"), f"--hostfile={hostfile}", "--launcher=slurm"]
    meeting = ["--launcher_args=--nodes=2 --cpus-per-task=1", "--no_ssh_check", "--master_addr=n1"]
    result = subprocess.run(
        [*start, *meeting, TRAIN, "--config", str(config)],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    require_same(tmp_path / "run", one_node, result.stderr)


def ranks_on(node: Node, config: Path) -> list[int]:
    """Process ids of the training processes of a config on a node, without their launchers."""
    return [
        pid
        for pid, words in node.processes().items()
        if "python" in words[0] and TRAIN in words[1:3] and str(config) in words
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_to_a_launcher_of_two_nodes_ends_both_with_a_checkpoint(
    nodes: tuple[Node, Node],
    ssh: None,
    hostfile: Path,
    tiny_data: Path,
    tmp_path: Path,
    launcher: str,
) -> None:
    config, run_dir = config_in(tmp_path, tiny_data, steps=100_000), tmp_path / "run"
    starts = {
        "deepspeed": [deepspeed(hostfile)],
        "torchrun": [[*torchrun(number), TRAIN] for number in (0, 1)],
    }[launcher]
    variables = {"DS_ENV_FILE": str(tmp_path / "deepspeed_env")}
    processes = [
        on(node, *start, "--config", config, log=tmp_path / f"log-{node.name}", **variables)
        for node, start in zip(nodes, starts, strict=False)
    ]
    try:
        wait_until(lambda: len(losses(run_dir)) >= 2, timeout_s=TIMEOUT_S, what="two steps")
        assert [len(ranks_on(node, config)) for node in nodes] == [1, 1]
        os.kill(nodes[0].pid_of(BIN / launcher), signal.SIGTERM)
        assert all(process.wait(60) == 1 for process in processes)
        wait_until(
            lambda: not any(ranks_on(node, config) for node in nodes),
            timeout_s=60,
            what="the end of all ranks",
        )
    finally:
        for pid in (pid for node in nodes for pid in ranks_on(node, config)):
            os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.kill()
    [step] = committed_steps(run_dir)
    # The run goes on from there, started in another way.
    result = finish(torchrun_command(config, f"training.max_steps={step + 1}"), timeout_s=TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"resumed after step {step}" in result.stderr
