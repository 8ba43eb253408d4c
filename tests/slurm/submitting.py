"""Jobs that launch/submit.py submits to the cluster of the tests, and what became of them."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from local_slurm import GOING, LocalSlurm
from processes import ROOT

from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.telemetry.metrics import read_metrics

STEERED = Path(__file__).with_name("steered")
# Two ranks on CPUs, of one node.
SMALL = ("--gpus-per-node", "0", "--ranks-per-node", "2", "--cpus-per-task", "1")


@dataclass
class Job:
    """A job of a run."""

    slurm: LocalSlurm
    id: str
    run_dir: Path

    @property
    def submission(self) -> Path:
        [folder] = [p.parent for p in self.run_dir.glob(f"submissions/*/slurm-{self.id}.log")]
        return folder

    def log(self) -> str:
        paths = list(self.run_dir.glob(f"submissions/*/slurm-{self.id}.log"))
        return paths[0].read_text() if paths else ""

    def losses(self) -> dict[int, float | None]:
        """By step; of one that was trained twice, the later."""
        records = read_metrics(self.run_dir)
        return {int(r["step"] or 0): r["loss"] for r in records if "loss" in r}

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: max(self.losses(), default=0) >= step, f"step {step}")

    def wait_for_requeue(self) -> None:
        """Until it waits in the queue again, then lets it begin soon."""
        self.wait_until(lambda: self.slurm.states(self.id) == {"PENDING"}, "its requeue")
        self.slurm.start_soon(self.id)

    def finish(self, *, timeout_s: float = 100) -> str:
        """Its last state, with each of its requeues begun soon."""
        pushed = False

        def ended() -> bool:
            nonlocal pushed
            states = self.slurm.states(self.id)
            if states == {"PENDING"} and not pushed:
                self.slurm.start_soon(self.id)
            pushed = states == {"PENDING"}
            return not states & GOING

        self.wait_until(ended, "its end", timeout_s)
        [state] = self.slurm.states(self.id)
        return state

    def starts(self) -> int:
        """How often it was started."""
        return self.log().count(f" of job {self.id} on ")

    def checkpoints(self) -> list[int]:
        return committed_steps(self.run_dir)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 100) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.log()}"
            time.sleep(0.1)


def run_submit(
    slurm: LocalSlurm, config: Path, *words: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """launch/submit.py as a user calls it, in an environment that steers the ranks."""
    return subprocess.run(
        [sys.executable, "launch/submit.py", "--config", str(config), *words],
        cwd=ROOT,
        env={**slurm.environment, "PYTHONPATH": f"{ROOT}:{STEERED}", **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )


def submit(slurm: LocalSlurm, config: Path, *words: str, **variables: str) -> Job:
    """A job of two ranks, whose run folder is "run" beside its config."""
    done = run_submit(slurm, config, *SMALL, *words, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit(), "only the job's id stands on standard output"
    return Job(slurm, done.stdout.strip(), config.parent / "run")
