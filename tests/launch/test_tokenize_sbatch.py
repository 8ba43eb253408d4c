"""launch/slurm/tokenize.sbatch without a cluster: `scontrol` and the interpreter are stand-ins.

With a real one: tests/slurm/test_slurm_tokenize.py.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from launching import wait_until
from processes import ROOT, clean_environment

SCRIPT = ROOT / "launch/slurm/tokenize.sbatch"
NOTE_WORDS = '#!/bin/bash\nprintf "%s\\n" "$@" > "$FAKE/$1"\n'
# Notes its words, then goes on until a signal ends it.
PROGRAM = '#!/bin/bash\nprintf "%s\\n" "$@" > "$FAKE/words"\nexec sleep "$FAKE_SECONDS"\n'
WORDS = ("corpus", "--output", "my data")


def environment(folder: Path, **variables: str) -> dict[str, str]:
    for name, text in (("scontrol", NOTE_WORDS), ("python", PROGRAM)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        **clean_environment(),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE": str(folder),
        "FAKE_SECONDS": "0",
        "MAMBA_DIST_PYTHON": "python",
        "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_PER_TASK": "3",
        **variables,
    }


def run(
    folder: Path, *words: str, cwd: Path = ROOT, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        cwd=cwd,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=30,
    )


def array(task: int, *, first: int, last: int, count: int) -> dict[str, str]:
    numbers = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({}, []),
        (array(5, first=0, last=15, count=16), ["--task", "5/16"]),
        ({**array(3, first=3, last=7, count=2), "MAMBA_DIST_TASKS": "16"}, ["--task", "3/16"]),
    ],
)
def test_a_job_does_its_share_with_a_worker_for_each_cpu(
    tmp_path: Path, variables: dict[str, str], task: list[str]
) -> None:
    result = run(tmp_path, *WORDS, **variables)
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "words").read_text().splitlines()
    assert words == ["data_prep/tokenize.py", "--workers", "3", *task, *WORDS]


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (WORDS, array(3, first=3, last=7, count=2), "by MAMBA_DIST_TASKS=N how many tasks"),
        (WORDS, array(0, first=0, last=7, count=2), "by MAMBA_DIST_TASKS=N how many tasks"),
        ((), {}, "expected at least a corpus"),
        (WORDS, {"SLURM_JOB_ID": ""}, "submit this file with sbatch"),
        (WORDS, {"MAMBA_DIST_PYTHON": "no-python"}, "no-python is no program"),
    ],
)
def test_a_wrong_start_is_explained(
    tmp_path: Path, words: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    result = run(tmp_path, *words, **variables)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "words").exists()


@pytest.mark.parametrize(("restarts", "requeued"), [("2", True), ("3", False)])
def test_a_job_at_its_time_limit_ends_its_program_and_is_requeued(
    tmp_path: Path, restarts: str, requeued: bool
) -> None:
    limits = {"MAMBA_DIST_MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": restarts}
    job = subprocess.Popen(
        ["bash", str(SCRIPT), *WORDS],
        cwd=ROOT,
        env=environment(tmp_path, FAKE_SECONDS="600", **limits),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until((tmp_path / "words").exists, timeout_s=20, what="the program")
        job.send_signal(signal.SIGUSR1)
        _, errors = job.communicate(timeout=20)
        assert job.returncode == 75
        assert (tmp_path / "requeue").exists() == requeued
        assert ("restarted 3 times, not again" in errors) != requeued
        with pytest.raises(ProcessLookupError):
            os.killpg(job.pid, 0)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
