"""The SLURM job script: its directives, its shell, and what it does with each exit code.

There is no cluster here: `srun` and `scontrol` are stand-ins on PATH. Whether a real scheduler
accepts the directives is tried in tests/slurm.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from launching import wait_until, write_config
from processes import ROOT, clean_environment

from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.telemetry.metrics import read_metrics
from mamba_dist.train.stop import EXIT_STOPPED

SCRIPT = ROOT / "launch/slurm/train.sbatch"
SCRIPTS = (SCRIPT, ROOT / "launch/slurm/tokenize.sbatch")
JOB_ID = 4711

FAKE_SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then
    printf 'node-a\\nnode-b\\n'
else
    echo "$@" >> "$FAKE/scontrol"
    exit "${FAKE_REQUEUE_STATUS:-0}"
fi
"""

# Notes what it was asked for, and ends as it is told to.
FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKE/srun"
env > "$FAKE/environment"
exit "$FAKE_STATUS"
"""

# Starts two ranks with srun's variables, and ends like srun with the largest of their codes.
RANKS_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
export MASTER_ADDR=127.0.0.1 SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
status=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    pids[rank]=$!
done
echo "${pids[@]}" > "$FAKE/pids.new"
mv "$FAKE/pids.new" "$FAKE/pids"
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    (( code > status )) && status=$code
done
exit "$status"
"""


def directives(script: Path = SCRIPT) -> list[tuple[int, str, str]]:
    """Line number, option and value of each #SBATCH line."""
    found = []
    for number, line in enumerate(script.read_text().splitlines()):
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, f"sbatch would not read {line!r}"
            found.append((number, match[1], match[2] or ""))
    return found


def code_lines(script: Path) -> list[str]:
    lines = script.read_text().splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


class Cluster:
    """A folder with a stand-in for SLURM's commands, and the job script started in it."""

    def __init__(self, folder: Path, srun: str) -> None:
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir(parents=True)
        for name, text in (("srun", srun), ("scontrol", FAKE_SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            **clean_environment(),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "MAMBA_DIST_PYTHON": sys.executable,
            "SLURM_JOB_ID": str(JOB_ID),
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_PER_TASK": "3",
            **variables,
        }

    def run(self, *words: str, cwd: Path = ROOT, **variables: str):
        return subprocess.run(
            ["bash", str(SCRIPT), *words],
            cwd=cwd,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def requeued(self) -> list[str]:
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster", FAKE_SRUN)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_bash_can_parse_it(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_directives_stand_before_the_first_command_and_once_each(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(i for i, x in enumerate(lines) if x.strip() and not x.startswith("#"))
    # sbatch silently ignores what comes later.
    assert all(number < first_command for number, _, _ in directives(script))
    options = [option for _, option, _ in directives(script)]
    assert len(set(options)) == len(options)


def test_directives_ask_for_what_a_run_needs_to_go_on_by_itself() -> None:
    given = {option: value for _, option, value in directives()}
    assert "requeue" in given
    assert given["open-mode"] == "append"
    match = re.fullmatch(r"USR1@(\d+)", given["signal"])
    assert match, "the ranks listen for SIGUSR1; with B: only the shell would get it"
    assert int(match[1]) >= 120
    assert re.fullmatch(r"\d+:\d\d:\d\d", given["time"])
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert "gpus-per-task" not in given
    # A site's own; they come by the command line.
    assert not given.keys() & {"partition", "account", "qos", "constraint", "nodelist", "mail-user"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_shell_is_strict_and_names_no_path_of_a_site(script: Path) -> None:
    code = code_lines(script)
    assert code[0] == "set -euo pipefail"
    for line in code:
        assert "`" not in line, line
        assert not re.search(r"(?<![\w.}*\"])/[a-z]+/", line), f"an absolute path: {line}"
        assert not re.search(r"(?<!\")\$@", line), f"$@ without quotes: {line}"
        # A quoted command with quoted words of its own is quoted as a whole.
        whole = re.sub(r'"\$\([^()]*\)"', "", line)
        bare = re.sub(r'"(?:[^"\\]|\\.)*"|\(\(.*?\)\)|\[\[.*?\]\]', "", whole)
        assert not re.search(r"\$(?!\?)", bare), f"an expansion without quotes: {line}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("status", [0, 1, 2, 137, 143])
def test_every_other_exit_code_is_passed_on_without_requeue(cluster: Cluster, status: int) -> None:
    result = cluster.run("--config", "a.yaml", FAKE_STATUS=str(status))
    assert result.returncode == status
    assert cluster.requeued() == []


def test_a_stopped_run_is_requeued(cluster: Cluster) -> None:
    result = cluster.run("--config", "a.yaml", FAKE_STATUS=str(EXIT_STOPPED))
    assert cluster.requeued() == [f"requeue {JOB_ID}"]
    assert result.returncode == EXIT_STOPPED


def test_a_run_that_is_stopped_again_and_again_is_not_requeued_for_ever(cluster: Cluster) -> None:
    limit = {"MAMBA_DIST_MAX_RESTARTS": "3", "FAKE_STATUS": str(EXIT_STOPPED)}
    cluster.run("--config", "a.yaml", **limit, SLURM_RESTART_COUNT="2")
    assert len(cluster.requeued()) == 1
    result = cluster.run("--config", "a.yaml", **limit, SLURM_RESTART_COUNT="3")
    assert len(cluster.requeued()) == 1
    assert result.returncode == EXIT_STOPPED
    assert "restarted 3 times" in result.stderr


def test_a_requeue_that_fails_is_said(cluster: Cluster) -> None:
    refused = {"FAKE_STATUS": str(EXIT_STOPPED), "FAKE_REQUEUE_STATUS": "1"}
    result = cluster.run("--config", "a.yaml", **refused)
    assert result.returncode == EXIT_STOPPED
    assert "could not be requeued" in result.stderr


def test_ranks_get_their_meeting_point_threads_and_the_users_words(cluster: Cluster) -> None:
    result = cluster.run("--config", "my runs/a.yaml", "training.seed=3", FAKE_STATUS="0")
    assert "start 1 of job 4711 on node-a node-b" in result.stdout
    words = (cluster.folder / "srun").read_text().splitlines()
    start = words.index(sys.executable)
    assert words[start + 1 :] == [
        "launch/train.py",
        "--config",
        "my runs/a.yaml",
        "training.seed=3",
    ]
    assert all(word.startswith("--") for word in words[:start])
    lines = (cluster.folder / "environment").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if "=" in line)
    assert given["MASTER_ADDR"] == "node-a"
    assert 1024 <= int(given["MASTER_PORT"]) < 32768
    assert given["OMP_NUM_THREADS"] == given["SRUN_CPUS_PER_TASK"] == "3"


def test_jobs_that_follow_each_other_meet_at_different_ports(cluster: Cluster) -> None:
    ports = set()
    for job in (4711, 4712):
        result = cluster.run("--config", "a.yaml", FAKE_STATUS="0", SLURM_JOB_ID=str(job))
        ports.add(result.stdout.strip().rpartition(":")[2])
    assert len(ports) == 2


@pytest.mark.parametrize(
    ("words", "change", "said"),
    [
        ([], {}, "--config FILE"),
        (["--config", "a.yaml"], {"SLURM_JOB_ID": ""}, "submit this file with sbatch"),
        (["--config", "a.yaml"], {"MAMBA_DIST_PYTHON": "no-python"}, "no-python is no program"),
    ],
)
def test_a_wrong_start_is_explained(
    cluster: Cluster, words: list[str], change: dict[str, str], said: str
) -> None:
    result = cluster.run(*words, FAKE_STATUS="0", **change)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (cluster.folder / "srun").exists()


def test_a_start_outside_of_the_repository_is_explained(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.run("--config", "a.yaml", cwd=tmp_path, FAKE_STATUS="0")
    assert result.returncode == 2
    assert "repository root" in result.stderr


def start_job(cluster: Cluster, config: Path, *overrides: str) -> subprocess.Popen[bytes]:
    with (cluster.folder / "log").open("ab") as log:
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--config", str(config), *overrides],
            cwd=ROOT,
            env=cluster.environment(SLURM_CPUS_PER_TASK="1"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_job(job: subprocess.Popen[bytes]) -> None:
    """Leaves no rank behind, whatever the test found."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def has_trained(run_dir: Path) -> Callable[[], bool]:
    return lambda: len(read_metrics(run_dir)) >= 2


def test_a_job_of_two_ranks_is_warned_requeued_and_finishes(
    tiny_data: Path, tmp_path: Path
) -> None:
    # Stand-in: two ranks on this machine with srun's variables, and the warning sent by the test.
    cluster = Cluster(tmp_path / "cluster", RANKS_SRUN)
    config = write_config(
        tmp_path / "job", tiny_data, training={"max_steps": 100_000, "eval_steps": None}
    )
    run_dir = tmp_path / "job/run"
    job = start_job(cluster, config, "checkpoint.save_steps=50000")
    try:
        wait_until(has_trained(run_dir), timeout_s=90, what="two steps")
        for pid in map(int, (cluster.folder / "pids").read_text().split()):
            os.kill(pid, signal.SIGUSR1)
        code = job.wait(timeout=60)
    finally:
        end_job(job)
    log = (cluster.folder / "log").read_text()
    assert code == EXIT_STOPPED, log[-3000:]
    assert cluster.requeued() == [f"requeue {JOB_ID}"]
    [step] = committed_steps(run_dir)
    again = start_job(cluster, config, f"training.max_steps={step + 1}")
    try:
        code = again.wait(timeout=90)
    finally:
        end_job(again)
    assert code == 0, (cluster.folder / "log").read_text()[-3000:]
    assert committed_steps(run_dir) == [step, step + 1]
    assert len(cluster.requeued()) == 1
