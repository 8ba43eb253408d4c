"""How a start ended, as its rank's log and the run's list of starts have it."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from written_checkpoint import OneRank

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.errors import DataError, DivergedError, ShortageError
from mamba_dist.telemetry.log import log_file
from mamba_dist.telemetry.merged_log import entries
from mamba_dist.telemetry.starts import read_starts
from mamba_dist.train.loop import Outcome
from mamba_dist.train.record import StartRecord, recorded_start
from mamba_dist.train.stop import StopRequest


class Told(OneRank):
    def texts_of_all_ranks(self, text: str) -> list[str]:
        return [text, "other", text]


class Second(Told):
    rank, size = 1, 3


def built(step: int) -> Any:
    """What the record asks of a run."""
    return SimpleNamespace(
        start=SimpleNamespace(step=5),
        total_steps=10,
        watchdog=SimpleNamespace(last_step=step, before_leaving=None),
    )


def outcome(step: int, stopped_by: str | None) -> Outcome:
    progress = Progress(
        step=step, next_sample=0, trained_tokens=0, global_batch_size=1, data_fingerprint=""
    )
    return Outcome(progress, stopped_by)


def ends(run_dir: Path, rank: int = 0) -> list[str]:
    return [entry.text for entry in entries(log_file(run_dir, rank)) if entry.kind == "END"]


def interrupt(record: StartRecord) -> None:
    stop = StopRequest()
    record.heed(stop)
    assert stop.before_leaving is not None
    stop.before_leaving()


def fail(error: BaseException) -> Any:
    def act(record: StartRecord, run: Any) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "reason", "detail", "code", "step"),
    [
        (lambda r, _: r.end(outcome(10, None)), "finished", "", 0, 10),
        (lambda r, _: r.end(outcome(8, "SIGUSR1")), "stopped", "SIGUSR1", 75, 8),
        (lambda _, run: run.watchdog.before_leaving("stacks in x"), "hang", "stacks in x", 75, 7),
        (lambda r, _: interrupt(r), "interrupted", "a second SIGINT", 130, 7),
        (fail(DataError("shard 7")), "mistake", "shard 7", 2, 7),
        (fail(ShortageError("too little")), "shortage", "too little", 75, 7),
        (fail(DivergedError("skipped")), "diverged", "skipped", 65, 7),
        (fail(ZeroDivisionError("by 0")), "crash", "ZeroDivisionError: by 0", 1, 7),
        (fail(MemoryError()), "crash", "MemoryError", 1, 7),
    ],
)
def test_every_end_has_a_reason_a_code_and_a_step(
    tmp_path: Path, act: Any, reason: str, detail: str, code: int, step: int
) -> None:
    run = built(step=7)
    try:
        with recorded_start(tmp_path, world=Told()) as record:
            record.train(run)
            act(record, run)
    except Exception:
        assert reason in ("shortage", "mistake", "diverged", "crash")
    [start] = read_starts(tmp_path)
    assert (start.reason, start.detail) == (reason, detail)
    assert (start.exit_code, start.last_step) == (code, step)
    assert (start.first_step, start.total_steps) == (5, 10)
    assert start.hosts == (socket.gethostname(), "other")
    told = f"{reason}: {detail}" if detail else reason
    assert ends(tmp_path) == [f"exit code {code} after step {step}, {told}"]


def test_an_interrupt_before_training_is_told(tmp_path: Path) -> None:
    """Building a large run takes minutes."""
    with recorded_start(tmp_path, world=Told()) as record:
        interrupt(record)
    [start] = read_starts(tmp_path)
    assert (start.reason, start.exit_code, start.first_step) == ("interrupted", 130, None)


def test_what_failed_before_training_has_no_step(tmp_path: Path) -> None:
    with pytest.raises(DataError), recorded_start(tmp_path, world=Told()):
        raise DataError("no data")
    [start] = read_starts(tmp_path)
    assert (start.reason, start.first_step, start.last_step) == ("mistake", None, None)
    assert ends(tmp_path) == ["exit code 2, mistake: no data"]


def test_a_crash_leaves_its_traceback_in_the_log_of_its_rank_and_no_start_but_the_first_ranks(
    tmp_path: Path,
) -> None:
    with pytest.raises(ZeroDivisionError), recorded_start(tmp_path, world=Second()):
        1 / 0  # noqa: B018
    start, error, _ = entries(log_file(tmp_path, 1))
    assert start.text.startswith(f"rank 1 of 3, host {socket.gethostname()}, process ")
    assert error.kind == "ERROR"
    assert "test_record.py" in error.text
    assert error.text.endswith("ZeroDivisionError: division by zero")
    assert read_starts(tmp_path) == []


def test_an_error_that_cannot_say_what_it_is_ends_a_start_too(tmp_path: Path) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    with pytest.raises(MuteError), recorded_start(tmp_path, world=Told()):
        raise MuteError
    [start] = read_starts(tmp_path)
    assert start.reason == "crash"
    assert start.detail.endswith("MuteError: <exception str() failed>")


def test_what_is_kept_of_a_huge_error_is_short(tmp_path: Path) -> None:
    with pytest.raises(DataError), recorded_start(tmp_path, world=Told()):
        raise DataError("x" * 10_000_000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) < 1 << 17


def test_the_first_end_is_the_one_that_counts(tmp_path: Path) -> None:
    run = built(step=7)

    def hang_and_fail() -> None:
        with recorded_start(tmp_path, world=Told()) as record:
            record.train(run)
            run.watchdog.before_leaving("stacks in x")
            raise DataError("what a rank that leaves does to the others")

    with pytest.raises(DataError):
        hang_and_fail()
    assert [start.reason for start in read_starts(tmp_path)] == ["hang"]
