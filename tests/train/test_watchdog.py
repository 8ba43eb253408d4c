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
SAVING_RANK = str(Path(__file__).with_name("saving_rank.py"))
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


def saved_with(fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SAVING_RANK, str(folder), str(TIMEOUT_S), fault]
    environment = clean_environment()
    return subprocess.run(
        command, text=True, capture_output=True, timeout=60, env=environment, check=False
    )


def test_a_save_of_which_the_disk_takes_nothing_ends_the_run(tmp_path: Path) -> None:
    done = saved_with("stuck", tmp_path)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert done.stdout == ""
    [said] = [line for line in done.stderr.splitlines() if "the run hangs" in line]
    assert said.startswith(
        "the run hangs: rank 0 wrote nothing of the save of step 2 for 1 s, since the disk does "
        f"not answer; {tmp_path}/hangs/now could not be made for the stacks"
    )
    assert f'File "{SAVING_RANK}"' in done.stderr


def test_training_goes_on_beside_a_writer_that_is_stuck_until_it_waits_for_it(
    tmp_path: Path,
) -> None:
    done = saved_with("stuck-beside", tmp_path)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert done.stdout == "trained\n"
    assert done.stderr.startswith(
        "the run hangs: rank 0 wrote nothing of the save of step 2 for 1 s, since the disk does "
        "not answer; the stacks of all ranks go to "
    )
    [stack] = stacks(tmp_path).values()
    assert "mamba_dist/checkpoint/rank_file.py" in stack


def test_a_save_may_take_long_while_the_disk_takes_more_or_other_ranks_are_busy(
    tmp_path: Path,
) -> None:
    done = saved_with("slow", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
