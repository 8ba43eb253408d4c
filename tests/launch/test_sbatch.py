"""The SLURM job script: its directives, its shell, and what it starts with which words.

There is no cluster here: what it calls are stand-ins on PATH. With a real scheduler:
tests/slurm/test_slurm_training.py; what becomes of a job: tests/commands/test_restarts.py.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, clean_environment

from mamba_dist.commands.job_script import limit_seconds

SCRIPT = ROOT / "launch/slurm/train.sbatch"
SCRIPTS = (SCRIPT, ROOT / "launch/slurm/tokenize.sbatch")
JOB_ID = 4711

FAKE_SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then
    printf 'node-a\\nnode-b\\n'
elif [[ "$1 $2 $3" == "show node node-a" ]]; then
    echo "NodeName=node-a Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=node-a"
fi
"""

# Notes what it was asked for, and ends as it is told to.
FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKE/srun"
env > "$FAKE/environment"
exit "$FAKE_STATUS"
"""

# Stands for the module that notes starts.
FAKE_PYTHON = """#!/bin/bash
echo "$@" >> "$FAKE/python"
[[ " $* " == *" began "* ]] && exit "${FAKE_BEGAN:-0}"
exit "$FAKE_STATUS"
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
    """A folder with stand-ins for what the job script calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        stand_ins = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "python-there": FAKE_PYTHON}
        for name, text in stand_ins.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        # Noted calls are files of the same names.
        self.noted = folder / "noted"
        self.noted.mkdir()

    def run(
        self, *words: str, cwd: Path = ROOT, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        given = {
            **clean_environment(),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAKE": str(self.noted),
            "FAKE_STATUS": "0",
            "MAMBA_DIST_PYTHON": "python-there",
            "SLURM_JOB_ID": str(JOB_ID),
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_PER_TASK": "3",
            **variables,
        }
        return subprocess.run(
            ["bash", str(SCRIPT), *words],
            cwd=cwd,
            env=given,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def environment_of_srun(self) -> dict[str, str]:
        lines = (self.noted / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


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
    assert limit_seconds(given["time"])
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
        assert not re.search(r"(?<![\w.}*\"])/(?!dev/)[a-z]+/", line), f"an absolute path: {line}"
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


def test_ranks_get_their_meeting_point_threads_and_the_users_words(cluster: Cluster) -> None:
    words = ("--config", "my runs/a.yaml", "training.seed=3")
    # What a shell inside of torchrun's rank leaves to its job.
    others = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    result = cluster.run(*words, FAKE_STATUS="75", SLURM_RESTART_COUNT="2", **others)
    assert "start 3 of job 4711 on node-a node-b" in result.stdout
    # Not the name, which need not resolve.
    assert "ranks meet at 127.0.0.1:" in result.stdout
    called = (cluster.noted / "srun").read_text().splitlines()
    start = called.index("python-there")
    assert called[start + 1 :] == [f"{ROOT}/launch/train.py", *words]
    assert all(word.startswith("--") for word in called[:start])
    given = cluster.environment_of_srun()
    assert not given.keys() & others.keys()
    assert given["MASTER_ADDR"] == "127.0.0.1"
    assert given["OMP_NUM_THREADS"] == given["SRUN_CPUS_PER_TASK"] == "3"
    assert given["PYTHONPATH"].split(":")[0] == str(ROOT)
    # What becomes of the job is decided in Python, which is told all of it.
    began, ended = (cluster.noted / "python").read_text().splitlines()
    counts = "--job 4711 --restarts 2 --max-restarts 100 --max-in-vain 3"
    assert began.endswith(f"{counts} began {' '.join(words)}")
    assert ended.endswith(f"{counts} --code 75 ended {' '.join(words)}")
    assert result.returncode == 75


def test_what_an_allocation_left_in_the_submitting_shell_does_not_reach_srun(
    cluster: Cluster,
) -> None:
    left = {
        **dict.fromkeys(("SLURM_GPUS", "SLURM_GPUS_PER_TASK", "SLURM_MEM_PER_CPU"), "3"),
        **dict.fromkeys(("SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE"), "3"),
        **dict.fromkeys(("SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST"), "mask_cpu:0x1"),
        "SLURM_DISTRIBUTION": "plane",
        "SLURM_EXPORT_ENV": "NONE",
    }
    # What the job itself has.
    own = {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_CPUS_PER_GPU": "5", "SLURM_CPUS_PER_TASK": ""}
    result = cluster.run("--config", "a.yaml", **left, **own)
    assert result.returncode == 0, result.stderr
    given = cluster.environment_of_srun()
    assert not given.keys() & left.keys()
    assert given["SLURM_GPUS_PER_NODE"] == "a100:4"
    # A rank has one GPU.
    assert given["OMP_NUM_THREADS"] == given["SRUN_CPUS_PER_TASK"] == "5"


def frozen(folder: Path) -> Path:
    """A copy of the code as submit.py makes it, of which a start says that it was this one."""
    (folder / "launch").mkdir(parents=True)
    (folder / "launch/train.py").touch()
    commands = folder / "mamba_dist/commands"
    commands.mkdir(parents=True)
    for package in (commands, commands.parent):
        (package / "__init__.py").touch()
    (commands / "restarts.py").write_text("print('restarts of', __file__)")
    return folder


def test_the_job_runs_the_copy_of_the_code_and_not_what_lies_in_its_working_directory(
    cluster: Cluster, tmp_path: Path
) -> None:
    repository, code = frozen(tmp_path / "edited since"), frozen(tmp_path / "frozen")
    chosen = {"MAMBA_DIST_CODE": str(code), "MAMBA_DIST_PYTHON": sys.executable}
    result = cluster.run("--config", "a.yaml", cwd=repository, **chosen)
    assert result.returncode == 0, result.stderr
    # Before and after the ranks.
    assert result.stdout.count(f"restarts of {code}/mamba_dist/") == 2
    assert (cluster.noted / "srun").read_text().splitlines()[-3] == f"{code}/launch/train.py"


def test_a_copy_of_the_code_that_python_would_not_find_is_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    # The ranks would train with an installed mamba_dist.
    code = frozen(tmp_path / "at 12:30")
    result = cluster.run("--config", "a.yaml", MAMBA_DIST_CODE=str(code))
    assert result.returncode == 2
    assert "rename the folder" in result.stderr
    assert not (cluster.noted / "srun").exists()


def test_nothing_starts_if_the_start_is_refused(cluster: Cluster) -> None:
    result = cluster.run("--config", "a.yaml", FAKE_BEGAN="2")
    assert result.returncode == 2
    assert not (cluster.noted / "srun").exists()


def test_jobs_meet_at_ports_of_their_own_that_no_program_has(cluster: Cluster) -> None:
    ports = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 15000 + 4712))
        other.listen()
        for job in (4711, 4712, 15000 + 4711):
            result = cluster.run("--config", "a.yaml", SLURM_JOB_ID=str(job))
            ports.append(int(result.stdout.splitlines()[0].rpartition(":")[2]))
    assert ports == [15000 + 4711, 15000 + 4713, 15000 + 4711]
    assert max(ports) < 32768


@pytest.mark.parametrize(
    ("words", "change", "said"),
    [
        ([], {}, "--config FILE"),
        (["--config", "a.yaml"], {"SLURM_JOB_ID": ""}, "submit this file with sbatch"),
        (["--config", "a.yaml"], {"MAMBA_DIST_PYTHON": "no-python"}, "no-python is no program"),
        (["--config", "a.yaml"], {"SLURM_ARRAY_TASK_ID": "0"}, "without --array"),
    ],
)
def test_a_wrong_start_is_explained(
    cluster: Cluster, words: list[str], change: dict[str, str], said: str
) -> None:
    result = cluster.run(*words, **change)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (cluster.noted / "srun").exists()


def test_a_start_outside_of_the_repository_is_explained(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.run("--config", "a.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "repository root" in result.stderr
