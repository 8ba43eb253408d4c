"""Signals in real processes, and launchers that really die."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import clean_environment, free_port
from tiny_run import write_config

from mamba_dist.train.stop import EXIT_INTERRUPTED, StopRequest, watch_launcher


def met() -> StopRequest:
    """Of a rank that has met the others."""
    stop = StopRequest()
    stop.ranks_met()
    return stop


LISTENER = """
import sys
from mamba_dist.train.stop import StopRequest
stop = StopRequest()
stop.listen()
print("listening", flush=True)
for line in sys.stdin:
    if line == "release\\n":
        stop.release()
    print(stop.reason, flush=True)
"""


class Listener:
    """A process that listens for signals and says when asked why it should stop."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=clean_environment(),
            text=True,
        )
        assert self._line() == "listening"

    def ask(self, question: str = "reason") -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self._line()

    def wait_for(self, reason: str) -> None:
        wait_until(lambda: self.ask() == reason, what=f"the reason {reason}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def wait_until(condition: Callable[[], bool], *, what: str, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {what}"
        time.sleep(0.01)


@pytest.fixture
def listener() -> Iterator[Listener]:
    one = Listener()
    yield one
    one.process.kill()
    one.process.communicate()


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing but live."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_signal_sets_the_flag_and_the_process_lives(
    listener: Listener, number: signal.Signals
) -> None:
    assert listener.ask() == "None"
    listener.process.send_signal(number)
    listener.wait_for(number.name)
    assert listener.process.poll() is None


def test_the_first_reason_stays_and_repeated_requests_kill_nothing(listener: Listener) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        listener.process.send_signal(number)
        listener.wait_for("SIGUSR1")


def test_a_second_sigint_leaves_at_once(listener: Listener) -> None:
    listener.process.send_signal(signal.SIGINT)
    listener.wait_for("SIGINT")
    listener.process.send_signal(signal.SIGINT)
    assert listener.process.wait(timeout=10) == EXIT_INTERRUPTED


BLOCKED = """
import ctypes
from mamba_dist.train.stop import StopRequest
StopRequest().listen()
print("listening", flush=True)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""


def test_a_second_sigint_ends_a_rank_that_waits_for_ever_in_native_code() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, env=clean_environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"listening\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == EXIT_INTERRUPTED
    process.stdout.close()


def test_a_sigterm_of_the_launcher_beside_a_ctrl_c_is_no_second_one(listener: Listener) -> None:
    listener.process.send_signal(signal.SIGTERM)
    listener.wait_for("SIGTERM")
    listener.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert listener.ask() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_after_the_run_signals_end_the_process_again(
    listener: Listener, number: signal.Signals
) -> None:
    assert listener.ask("release") == "None"
    listener.process.send_signal(number)
    assert listener.process.wait(timeout=10) == -number


def test_a_living_launcher_asks_for_nothing_and_a_dead_one_for_a_stop(
    launcher: subprocess.Popen[bytes],
) -> None:
    stop = met()
    watch_launcher(stop, [os.getpid(), launcher.pid], poll_s=0.01)
    time.sleep(0.2)
    assert stop.reason is None
    launcher.kill()
    launcher.wait()
    wait_until(lambda: stop.reason is not None, what="the watch to notice")
    assert stop.reason == "the launcher died"


def test_a_launcher_that_nobody_has_reaped_is_dead_too(
    launcher: subprocess.Popen[bytes],
) -> None:
    stop = met()
    launcher.kill()
    # WNOWAIT leaves it a zombie: its folder in /proc is still there.
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{launcher.pid}/stat")
    watch_launcher(stop, [launcher.pid], poll_s=0.01)
    wait_until(lambda: stop.reason is not None, what="the watch to notice")


def test_a_launcher_that_died_before_the_watch_began_is_noticed(
    launcher: subprocess.Popen[bytes],
) -> None:
    launcher.kill()
    launcher.wait()
    stop = met()
    watch_launcher(stop, [launcher.pid], poll_s=0.01)
    wait_until(lambda: stop.reason is not None, what="the watch to notice")


# Waits for the other rank at a store that is gone with its launcher, as a rank does that is still
# starting when its torchrun is killed.
STARTING = """
import os, sys
from mamba_dist.config.load import load_config
from mamba_dist.train import run
run.launcher_pids = lambda: [int(sys.argv[2])]
print("starting", flush=True)
run.run_training(load_config(sys.argv[1], []).config)
"""


def test_a_rank_whose_launcher_dies_before_the_ranks_have_met_leaves(
    launcher: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    config = write_config(tmp_path, tmp_path)
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    rank = subprocess.Popen(
        [sys.executable, "-c", STARTING, str(config), str(launcher.pid)],
        env={
            **clean_environment(),
            **variables,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert rank.stdout is not None
        # Behind what DeepSpeed says when it is imported.
        assert "starting\n" in iter(rank.stdout.readline, "")
        # It comes to wait for the others.
        time.sleep(1.0)
        assert rank.poll() is None
        launcher.kill()
        launcher.wait()
        _, said = rank.communicate(timeout=30)
    finally:
        rank.kill()
    assert rank.returncode == 75, said
    assert "the launcher died before the ranks had met" in said


def test_a_rank_without_a_launcher_watches_nothing() -> None:
    before = threading.active_count()
    watch_launcher(StopRequest(), [])
    assert threading.active_count() == before
