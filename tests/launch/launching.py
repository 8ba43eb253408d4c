"""Starts launch/train.py the ways a user does, on the tiny data set of the tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import ROOT, clean_environment, free_port
from tiny_run import write_config as write_config

BIN = Path(sys.executable).parent
_BEGUN: list[tuple[subprocess.Popen[bytes], Path]] = []
TRAIN = str(ROOT / "launch" / "train.py")


def deepspeed_command(config: Path, *overrides: str, ranks: int = 2) -> list[str]:
    port = ["--master_port", str(free_port())]
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), *port]
    return [*launcher, TRAIN, "--config", str(config), *overrides]


def torchrun_command(config: Path, *overrides: str, ranks: int = 2) -> list[str]:
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks)]
    port = ["--master_port", str(free_port())]
    return [*launcher, *port, TRAIN, "--config", str(config), *overrides]


def ranks_command(config: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """The ranks alone: for runs of which no launcher is the point, 3 s sooner."""
    launcher = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    return [*launcher, str(ranks), str(free_port()), "--config", str(config), *overrides]


def python_command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, TRAIN, "--config", str(config), *overrides]


def finish(command: Sequence[str], *, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    """Runs a launch to its end."""
    return subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=timeout_s
    )


def begin(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a launch in a session of its own, its output in a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=clean_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _BEGUN.append((process, Path(command[command.index("--config") + 1])))
    return process


def end_all() -> None:
    """Ends what `begin` started and a failed test left running."""
    while _BEGUN:
        process, config = _BEGUN.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
        kill_all(config)


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {what}"
        time.sleep(0.01)


def ranks_of(config: Path) -> list[int]:
    """Process ids of the training processes of a config, launchers not counted."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        is_rank = TRAIN.encode() in words and b"deepspeed.launcher.launch" not in words
        launched_directly = not any(w.endswith((b"/deepspeed", b"/torchrun")) for w in words)
        if is_rank and launched_directly and str(config).encode() in words:
            found.append(int(entry.name))
    return found


def kill_all(config: Path) -> None:
    for pid in ranks_of(config):
        os.kill(pid, signal.SIGKILL)
