"""Ranks that hang are found, leave their stacks and go; ranks that work are left alone."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import clean_environment

from mamba_dist.train.stop import EXIT_STOPPED

RANK = str(Path(__file__).with_name("watched_rank.py"))
TIMEOUT_S = 1.0
# Counting, being followed, and waiting for a rank that writes nothing.
WITHIN_S = 20

Begin = Callable[[str, str], list[subprocess.Popen[str]]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Two ranks with the faults given, once both have begun."""
    ranks: list[subprocess.Popen[str]] = []

    def started(*faults: str) -> list[subprocess.Popen[str]]:
        for rank, fault in enumerate(faults):
            command = [sys.executable, RANK, str(tmp_path), str(rank), str(TIMEOUT_S), fault]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            environment = clean_environment()
            ranks.append(subprocess.Popen(command, text=True, env=environment, **pipes))  # type: ignore[call-overload]
        for one in ranks:
            assert one.stdout.readline() == "here\n"  # type: ignore[union-attr]
        for one, other in zip(ranks, ranks[::-1], strict=True):
            print(other.pid, file=one.stdin, flush=True)
        for one in ranks:
            assert one.stdout.readline() == "begun\n"  # type: ignore[union-attr]
        return ranks

    yield started
    for one in ranks:
        one.kill()
        one.communicate()


def stacks(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "hangs").glob("*/*")}


def test_a_rank_that_a_signal_stopped_is_woken_and_both_leave_their_stacks(
    tmp_path: Path, begin: Begin
) -> None:
    waiting, stopped = begin("idle", "works")
    stopped.send_signal(signal.SIGSTOP)
    said = [one.communicate(timeout=WITHIN_S)[1] for one in (waiting, stopped)]
    assert (waiting.returncode, stopped.returncode) == (EXIT_STOPPED, EXIT_STOPPED)
    assert said[0].startswith("the run hangs: rank 0 got nothing done for 1 s after step 1, rank 1")
    assert "is stopped by a signal; the stacks of all ranks go to " in said[0]
    assert said[1] == "", "it is said once"
    found = stacks(tmp_path)
    assert sorted(found) == ["rank-00000.txt", "rank-00001.txt"]
    for rank, text in enumerate(found[name] for name in sorted(found)):
        assert text.startswith(f"rank {rank}, process ")
        assert f'File "{RANK}"' in text


def test_a_rank_that_holds_the_interpreter_shows_its_stack_all_the_same(
    tmp_path: Path, begin: Begin
) -> None:
    waiting, locked = begin("idle", "locked")
    assert waiting.wait(timeout=WITHIN_S) == EXIT_STOPPED
    assert list(stacks(tmp_path)) == ["rank-00000.txt"]
    assert locked.poll() is None, "to end it is the launcher's task"
    locked.kill()
    assert f'File "{RANK}"' in locked.communicate()[1]


def test_ranks_that_work_and_a_job_that_is_suspended_go_on(tmp_path: Path, begin: Begin) -> None:
    ranks = begin("patient", "patient")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for one in ranks:
            one.send_signal(number)
        time.sleep(1.5 * TIMEOUT_S)
    for one in ranks:
        assert one.communicate(timeout=WITHIN_S)[1] == ""
        assert one.returncode == 0
    assert not stacks(tmp_path)
