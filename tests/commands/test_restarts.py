"""Whether a job of SLURM starts again; `scontrol` is a stand-in. With a real one: tests/slurm."""

import json
import os
from pathlib import Path

import pytest
import yaml
from written_checkpoint import stage_as_ranks

from mamba_dist.commands import scheduler
from mamba_dist.commands.restarts import (
    Bounds,
    Event,
    main,
    read_events,
    starts_in_vain,
    why_not_again,
)
from mamba_dist.commands.scheduler import JobState
from mamba_dist.train.stop import EXIT_STOPPED

RUNNING = "JobState=RUNNING Reason=None Requeue=1"
BOUNDS = Bounds(restarts=100, in_vain=3)
GOING = JobState(running=True, may_be_requeued=True, out_of_time=False)


def event(what: str, checkpoint: int | None) -> Event:
    return Event("7", 1, what, checkpoint, "now")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("events", "in_vain"),
    [
        ([("began", None), ("ended", None)], 1),
        ([("began", None), ("ended", 5)], 0),
        ([("began", 5), ("ended", 5)], 1),
        ([("began", 5), ("ended", 5), ("began", 5), ("ended", 5)], 2),
        ([("began", 5), ("ended", 5), ("began", 5), ("ended", 9)], 0),
        # Back behind what was reached, after a rollback, and to it again, is nothing new.
        ([("began", 5), ("ended", 9), ("began", 5), ("ended", 9)], 1),
        # The second start passed over a damaged one; those after it get on from there.
        ([("began", None), ("ended", 171), ("began", 171), ("ended", 61)], 1),
        (
            [
                *(("ended", 171), ("began", 171), ("ended", 61), ("began", 61), ("ended", 91)),
                *(("began", 91), ("ended", 121)),
            ],
            1,
        ),
        # To the same place and back again, for ever.
        ([("ended", 9), ("ended", 5), ("ended", 9), ("ended", 5), ("ended", 9), ("ended", 5)], 3),
        # SLURM ended the second start, with and without a line of it.
        ([("began", 5), ("ended", 5), ("began", 5), ("began", 5), ("ended", 5)], 2),
        ([("began", 5), ("ended", 5), ("began", 5), ("ended by SLURM", 5)], 1),
        ([("began", 5), ("ended", 5), ("began", 5), ("began", 6), ("ended", 6)], 1),
        ([("began", 5), ("out of time", 5), ("began", 5)], 1),
        # The ranks saved after SLURM had terminated them.
        ([("began", 5), ("out of time", 5), ("ended by SLURM", 6)], 0),
    ],
)
def test_starts_in_vain_are_those_in_a_row_without_a_new_checkpoint(
    events: list[tuple[str, int | None]], in_vain: int
) -> None:
    assert starts_in_vain([event(*each) for each in events]) == in_vain


@pytest.mark.parametrize("code", [EXIT_STOPPED, 1, 134, 137, 138, 143])
def test_whatever_may_go_better_next_time_is_tried_again(code: int) -> None:
    assert why_not_again(code, state=GOING, restarts=99, in_vain=2, bounds=BOUNDS) is None


@pytest.mark.parametrize(
    ("code", "restarts", "in_vain", "reason"),
    [
        (2, 0, 0, "a mistake"),
        (65, 0, 0, "training is broken"),
        (EXIT_STOPPED, 100, 0, "started again 100 times"),
        (137, 5, 3, "the last 3 starts made no new checkpoint"),
    ],
)
def test_what_would_happen_again_is_not_tried_for_ever(
    code: int, restarts: int, in_vain: int, reason: str
) -> None:
    found = why_not_again(code, state=GOING, restarts=restarts, in_vain=in_vain, bounds=BOUNDS)
    assert found is not None
    assert reason in found


class Cluster:
    """A run, and an `scontrol` that notes its calls."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.config = folder / "config.yaml"
        training = {"run_dir": str(self.run_dir), "gradient_accumulation_steps": 1}
        self.config.write_text(
            yaml.safe_dump(
                {
                    "schema_version": 2,
                    "training": {**training, "max_steps": 10, "warmup_steps": 0},
                    "data": {"dataset_path": "data", "tokenizer_path": "tokenizer.json"},
                }
            )
        )
        self.calls = folder / "calls"
        self.state(RUNNING)

    def state(self, shown: str, *, refusals: int = 0) -> None:
        """What SLURM says of the job, and how often it refuses to requeue it."""
        script = self.config.with_name("scontrol")
        script.write_text(
            f"#!/bin/bash\n[[ $1 == show ]] && echo '{shown}' && exit\n"
            f'echo "$@" >> {self.calls}\n'
            f"(( $(wc -l < {self.calls}) > {refusals} ))\n"
        )
        script.chmod(0o755)

    def main(self, when: str, *, code: int = 0, restarts: int = 0) -> int:
        counts = ("--restarts", str(restarts), "--max-restarts", "9", "--max-in-vain", "3")
        words = (when, "--config", str(self.config))
        return main(["--job", "7", *counts, "--code", str(code), *words])

    def requeues(self) -> int:
        return self.calls.read_text().count("requeue 7") if self.calls.exists() else 0


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(scheduler, "_PAUSE_S", 0.01)
    return Cluster(tmp_path)


def test_a_job_that_gets_nowhere_ends_at_its_bound(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for restarts in range(4):
        assert cluster.main("began", restarts=restarts) == 0
        if restarts == 0:
            (cluster.run_dir / "checkpoints/step-00000005").mkdir(parents=True)
        assert cluster.requeues() == restarts
        # The code of the ranks is the job's.
        assert cluster.main("ended", code=137, restarts=restarts) == 137
    assert cluster.requeues() == 3
    assert "not started again: the last 3 starts made no new checkpoint" in capsys.readouterr().err
    lines = (cluster.run_dir / "restarts.jsonl").read_text().splitlines()
    assert [json.loads(line)["decision"][:11] for line in lines][-1] == "not started"


def test_a_save_that_the_next_start_commits_is_progress(cluster: Cluster) -> None:
    for restarts in range(3):
        assert cluster.main("began", restarts=restarts) == 0
        if restarts == 2:
            stage_as_ranks(cluster.run_dir, 4, 2)
        assert cluster.main("ended", code=137, restarts=restarts) == 137
    assert cluster.requeues() == 3


@pytest.mark.parametrize(
    ("shown", "requeues"),
    [
        # Cancelled, preempted or requeued by hand: to requeue it would bring a cancelled job back.
        ("JobState=COMPLETING Reason=None Requeue=1", 0),
        ("JobState=COMPLETING Reason=TimeLimit Requeue=1", 0),
        ("JobState=RUNNING Reason=None Requeue=0", 0),
        (RUNNING, 1),
    ],
)
def test_a_job_that_slurm_ends_is_left_to_slurm(
    cluster: Cluster, shown: str, requeues: int
) -> None:
    cluster.state(shown)
    cluster.main("began")
    assert cluster.main("ended", code=EXIT_STOPPED) == EXIT_STOPPED
    assert cluster.requeues() == requeues


@pytest.mark.parametrize(
    ("shown", "requeues"),
    [
        ("JobState=COMPLETING Reason=TimeLimit Requeue=1", 1),
        ("JobState=COMPLETING Reason=TimeLimit Requeue=0", 0),
        ("JobState=COMPLETING Reason=None Requeue=1", 0),
        # A signal of somebody else; what follows from it is seen when the ranks have left.
        (RUNNING, 0),
    ],
)
def test_a_job_that_its_time_limit_cuts_off_is_requeued_before_its_ranks_have_left(
    cluster: Cluster, shown: str, requeues: int
) -> None:
    cluster.state(shown)
    cluster.main("began")
    assert cluster.main("terminated") == 0
    assert cluster.requeues() == requeues


def test_a_controller_that_is_away_for_a_moment_is_asked_again(cluster: Cluster) -> None:
    cluster.state(RUNNING, refusals=2)
    cluster.main("began")
    cluster.main("ended", code=EXIT_STOPPED)
    assert cluster.requeues() == 3


def test_starts_that_cannot_be_counted_are_not_repeated(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.run_dir.write_text("a file where the run folder should be")
    assert cluster.main("ended", code=137) == 137
    assert cluster.requeues() == 0
    assert "starts cannot be counted" in capsys.readouterr().err


def test_lines_that_a_crash_spoilt_cost_no_other_line(cluster: Cluster) -> None:
    record = cluster.run_dir / "restarts.jsonl"
    for restarts in range(3):
        cluster.main("began", restarts=restarts)
        assert cluster.main("ended", code=137, restarts=restarts) == 137
        with record.open("ab") as file:
            # A block that was never written, and a line cut short.
            file.write(b'\xff\0\n{"job": "7", "st')
    assert cluster.requeues() == 2
    assert len(read_events(cluster.run_dir, "7")) == 6


def test_slurm_itself_does_not_start_a_job_for_ever(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.main("began", restarts=9) == 0
    assert cluster.main("began", restarts=10) == 2
    assert "submit anew" in capsys.readouterr().err
