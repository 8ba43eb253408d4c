"""Each rank's log: all that it says and dies from, whatever happens to its file."""

import errno
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import clean_environment

from mamba_dist.telemetry import log as log_module
from mamba_dist.telemetry.log import RankLog, log_file, logging_to, setup_logging
from mamba_dist.telemetry.merged_log import Entry, entries

PACKAGE = logging.getLogger("mamba_dist")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = PACKAGE.handlers[:], PACKAGE.level, PACKAGE.propagate
    yield
    PACKAGE.handlers[:], PACKAGE.level, PACKAGE.propagate = before


def said(path: Path) -> list[tuple[str, str]]:
    return [(entry.kind, entry.text) for entry in entries(path)]


def test_the_file_has_every_line_and_the_terminal_only_warnings_of_a_later_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", False)
    setup_logging(rank=3, world_size=4)
    log = RankLog(log_file(tmp_path, 3))
    with warnings.catch_warnings(record=True) as shown_warnings, logging_to(log):
        logging.getLogger("mamba_dist.train").info("saved %d", 5)
        logging.getLogger("mamba_dist.data").warning("late")
        logging.getLogger("somebody").info("nothing of interest")
        logging.getLogger("DeepSpeed").error("out of order")
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    logging.getLogger("mamba_dist.train").info("after it")
    lines = said(tmp_path / "logs/rank-00003.log")
    assert lines[:3] == [
        ("INFO", "saved 5"),
        ("WARNING", "late"),
        ("ERROR", "DeepSpeed: out of order"),
    ]
    [(kind, text)] = lines[3:]
    assert (kind, text[-23:]) == ("WARNING", "DeprecationWarning: old")
    shown = capsys.readouterr().err
    assert "[rank 3] late" in shown
    assert [str(each.message) for each in shown_warnings] == ["old"], "it is shown as it was"
    assert "saved 5" not in shown


def test_a_library_without_a_handler_is_shown_as_before(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys\n"
        "from mamba_dist.telemetry.log import RankLog, logging_to\n"
        "own = logging.getLogger('own')\n"
        "own.addHandler(logging.StreamHandler(sys.stdout))\n"
        "with logging_to(RankLog(pathlib.Path(sys.argv[1]))):\n"
        "    logging.getLogger('bare').warning('shown')\n"
        "    logging.getLogger('bare').info('not shown')\n"
        "    logging.getLogger('bare').warning('%d', 'no number')\n"
        "    own.warning('once')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n"
    assert done.stderr.startswith("shown\n")
    assert "--- Logging error ---" in done.stderr
    assert "once" not in done.stderr
    lines = [("WARNING", "bare: shown"), ("WARNING", "own: once")]
    assert said(tmp_path / "log") == lines


def test_rank_zero_says_all_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0, world_size=4)
    logging.getLogger("mamba_dist.train").info("saved 5")
    assert capsys.readouterr().err.endswith(" saved 5\n")


def test_what_ends_a_thread_is_in_the_file_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    log = RankLog(tmp_path / "log")
    with logging_to(log):
        thread = threading.Thread(target=lambda: [].pop())
        thread.start()
        thread.join()
    [(kind, text)] = said(tmp_path / "log")
    assert kind == "ERROR"
    assert text.startswith("a thread ended\n  Traceback")
    assert text.endswith("IndexError: pop from empty list")


def test_a_crash_in_native_code_leaves_its_stacks(tmp_path: Path) -> None:
    code = (
        "import ctypes, pathlib, sys\n"
        "from mamba_dist.telemetry.log import RankLog\n"
        "log = RankLog(pathlib.Path(sys.argv[1]), native_crashes=True)\n"
        "log.say('INFO', 'here')\n"
        "def the_culprit():\n    ctypes.string_at(0)\n"
        "the_culprit()\n"
    )
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=clean_environment())
    assert done.returncode < 0
    [entry] = entries(path)
    assert "Fatal Python error: Segmentation fault" in entry.text
    assert "in the_culprit" in entry.text
    # The next start goes on behind it.
    RankLog(path).say("START", "again")
    assert [entry.kind for entry in entries(path)] == ["INFO", "START"]


def test_starts_are_appended_and_a_line_that_a_kill_cut_is_no_part_of_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    RankLog(path).say("INFO", "one\nof two lines")
    path.write_bytes(path.read_bytes() + b"2026-11-27T02:00:48.12")
    RankLog(path).say("INFO", "two")
    assert said(path)[1] == ("INFO", "two")
    assert path.read_bytes().count(b"\n") == 4


def test_a_log_that_grows_keeps_its_end_in_two_bounded_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_MOST_BYTES", 1000)
    log = RankLog(log_file(tmp_path, 0))
    for number in range(200):
        log.say("INFO", f"line {number}")
    files = sorted((tmp_path / "logs").iterdir())
    assert [path.name for path in files] == ["rank-00000.log", "rank-00000.old.log"]
    assert all(path.stat().st_size < 1100 for path in files)
    numbers = [int(text.split()[1]) for path in files[::-1] for _, text in said(path)]
    assert numbers == list(range(numbers[0], 200))


def test_a_folder_that_was_renamed_keeps_what_was_said_before(tmp_path: Path) -> None:
    log = RankLog(log_file(tmp_path / "run", 0))
    log.say("INFO", "before")
    (tmp_path / "run").rename(tmp_path / "kept")
    log.say("INFO", "after")
    assert said(log_file(tmp_path / "kept", 0)) == [("INFO", "before")]
    assert said(log_file(tmp_path / "run", 0)) == [("INFO", "after")]


def test_a_full_disk_is_said_once_and_the_log_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RankLog(tmp_path / "log")
    log.say("INFO", "one")

    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.say("INFO", "two")
        log.say("INFO", "three")
    log.say("INFO", "four")
    assert said(tmp_path / "log") == [("INFO", "one"), ("INFO", "four")]
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1


def test_a_moment_is_read_as_it_was_written(tmp_path: Path) -> None:
    RankLog(tmp_path / "log").say("INFO", "now", at=1795745537.255)
    assert list(entries(tmp_path / "log")) == [Entry(1795745537.255, "INFO", "now")]
