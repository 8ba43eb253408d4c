"""The starts of a run and their ends, as they are read back; whether a run holds its folder."""

import fcntl
import logging
import time
from pathlib import Path

import pytest

from mamba_dist.telemetry.starts import LOCK, STARTS_FILE, StartsFile, is_held, read_starts


def begin(run_dir: Path, **changes: object) -> StartsFile:
    starts = StartsFile(run_dir)
    facts = {"hosts": ["a", "b"], "ranks": 16, "launcher": "srun", "job": "77", "versions": {}}
    starts.begin(**{**facts, **changes})  # type: ignore[arg-type]
    return starts


def test_starts_come_back_with_their_ends(tmp_path: Path) -> None:
    first = begin(tmp_path)
    first.train(first_step=0, total_steps=1000)
    first.end("stopped", detail="SIGUSR1", exit_code=75, step=720)
    begin(tmp_path, job=None).end("mistake", detail="no data", exit_code=2, step=None)
    begin(tmp_path).train(first_step=720, total_steps=900)
    stopped, refused, killed = read_starts(tmp_path)
    assert (stopped.hosts, stopped.ranks, stopped.job) == (("a", "b"), 16, "77")
    assert (stopped.first_step, stopped.last_step, stopped.total_steps) == (0, 720, 1000)
    assert (stopped.reason, stopped.detail, stopped.exit_code) == ("stopped", "SIGUSR1", 75)
    assert stopped.ended_at is not None
    assert stopped.at <= stopped.ended_at <= refused.at
    assert (refused.reason, refused.first_step, refused.last_step) == ("mistake", None, None)
    assert (killed.reason, killed.first_step, killed.total_steps) == (None, 720, 900)


def test_a_line_that_a_kill_cut_costs_no_other(tmp_path: Path) -> None:
    begin(tmp_path)
    path = tmp_path / STARTS_FILE
    path.write_bytes(path.read_bytes() + b'{"event": "training", "st')
    assert [start.first_step for start in read_starts(tmp_path)] == [None]
    begin(tmp_path).end("finished", detail="", exit_code=0, step=9)
    assert [start.reason for start in read_starts(tmp_path)] == [None, "finished"]


def test_the_end_of_a_run_whose_folder_another_one_took_is_not_that_of_the_other(
    tmp_path: Path,
) -> None:
    first = begin(tmp_path)
    (tmp_path / STARTS_FILE).unlink()
    time.sleep(0.002)
    begin(tmp_path, ranks=3)
    first.end("mistake", detail="it was deleted", exit_code=2, step=5)
    assert [(start.ranks, start.reason) for start in read_starts(tmp_path)] == [(3, None)]


def test_a_disk_that_refuses_is_said_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STARTS_FILE).mkdir()
    package = logging.getLogger("mamba_dist")
    before, package.propagate = package.propagate, True
    begin(tmp_path)
    package.propagate = before
    assert "cannot be written (Is a directory)" in caplog.text


def test_a_folder_is_held_as_long_as_somebody_has_its_lock(tmp_path: Path) -> None:
    assert is_held(tmp_path) is False
    with (tmp_path / LOCK).open("w") as lock:
        assert is_held(tmp_path) is False
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_held(tmp_path) is True
    assert is_held(tmp_path) is False


def test_a_file_system_without_locks_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("Function not implemented")

    (tmp_path / LOCK).touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert is_held(tmp_path) is None
