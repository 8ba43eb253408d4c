"""SLURM's own commands, as submitting a job and starting it again need them."""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba_dist.errors import SchedulerError

_TIMEOUT_S = 120
# A controller that is restarted is away for a minute; a job must not end for that.
_TRIES = 10
_PAUSE_S = 10.0


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    running: bool
    """False once SLURM itself ends it: cancelled, preempted, requeued by hand, out of time."""
    may_be_requeued: bool
    out_of_time: bool


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def try_submission(script: Path, *, environment: Mapping[str, str]) -> str:
    """Where and when SLURM would start the job, in its words.

    Raises:
        SchedulerError: SLURM would refuse it.
    """
    # It answers on standard error, like its refusals.
    return _call("sbatch", "--test-only", script, environment=environment).replace("sbatch: ", "")


def submit(script: Path, *, environment: Mapping[str, str]) -> str:
    """The id of the job, which now waits in the queue.

    Raises:
        SchedulerError: SLURM refuses it.
    """
    words = _call("sbatch", "--parsable", script, environment=environment).split()
    # With more than one cluster it reads ID;CLUSTER. Warnings may stand before it.
    return words[-1].partition(";")[0]


def waiting_or_running(
    jobs: Sequence[str], *, scripts_in: Path, environment: Mapping[str, str]
) -> list[str]:
    """Jobs of this user that have not ended: those of the ids, and those of scripts in a folder.

    Raises:
        SchedulerError: SLURM cannot be asked.
    """
    # All of this user, since a single id that SLURM has forgotten is an error to it. A script tells
    # of jobs whose submission was broken off, and of those that were submitted by hand.
    words = ("--noheader", f"--user={os.getuid()}", "--format=%A %o")
    lines = _call("squeue", *words, environment=environment).splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
    return [
        job
        for job, command in listed.items()
        if job in jobs or Path(command).is_relative_to(scripts_in)
    ]


def job_state(job: str) -> JobState:
    """What SLURM says of a job that runs or just ran.

    Raises:
        SchedulerError: SLURM did not answer for several tries.
    """
    words = _call_again("scontrol", "show", "job", job, "--oneliner").split()
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    return JobState(
        running=fields.get("JobState") == "RUNNING",
        may_be_requeued=fields.get("Requeue") == "1",
        out_of_time=fields.get("Reason") == "TimeLimit",
    )


def requeue(job: str) -> None:
    """Puts a job back into the queue; SLURM ends this process then, if it is part of the job.

    Raises:
        SchedulerError: SLURM refuses, or did not answer for several tries.
    """
    _call_again("scontrol", "requeue", job)


def _call_again(*command: str) -> str:
    for _ in range(_TRIES - 1):
        try:
            return _call(*command)
        except SchedulerError:
            time.sleep(_PAUSE_S)
    return _call(*command)


def _call(*command: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; without an `environment` it gets this process's."""
    words = list(map(str, command))
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise SchedulerError(
            f"{words[0]} is not installed here; submit on a machine of the cluster, its login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{words[0]} gave no answer for {_TIMEOUT_S} s") from error
    if done.returncode:
        raise SchedulerError(f"{words[0]}: {(done.stderr or done.stdout).strip()}")
    return (done.stdout + done.stderr * (not done.stdout)).strip()
