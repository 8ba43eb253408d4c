"""Starts launch/train.py the ways a user does, on the tiny data set of the tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from processes import ROOT, clean_environment, free_port
from tiny_run import write_config as write_config

BIN = Path(sys.executable).parent
_BEGUN: list[tuple[subprocess.Popen[bytes], Path]] = []
TRAIN = str(ROOT / "launch" / "train.py")
# All that DeepSpeed could build at a start, as a kill in the middle of a build leaves it: torch
# waits for ever at such a lock.
EXTENSIONS = (
    *(
        "async_io",
        "cpu_adagrad",
        "cpu_adam",
        "cpu_lion",
        "deepspeed_ccl_comm",
        "deepspeed_shm_comm",
    ),
    *("deepspeed_not_implemented", "fused_adam", "fused_lamb", "fused_lion", "pin_memory", "utils"),
)
# Where the launches of the test that runs keep what is not of the run itself.
_SURROUNDINGS: list[Path] = []


@contextmanager
def surroundings(folder: Path) -> Iterator[None]:
    """Gives launches stale locks to stumble over, and looks at what they leave outside of their run
    folders: nothing, in /dev/shm, in TMPDIR and where extensions are built."""
    for name in EXTENSIONS:
        (folder / "extensions" / name).mkdir(parents=True)
        (folder / "extensions" / name / "lock").touch()
    (folder / "tmp").mkdir()
    before = [*_contents(folder), *_shared_memory()]
    _SURROUNDINGS.append(folder)
    try:
        yield
    finally:
        _SURROUNDINGS.pop()
    left = sorted({*_contents(folder), *_shared_memory()} - set(before))
    assert not left, f"left behind: {left}"


def _contents(folder: Path) -> list[str]:
    # Folders do not count: torch's compiler makes its cache's when it is imported, one for a user,
    # and torchrun leaves those of its log. Both are empty.
    return [str(path) for path in folder.rglob("*") if not path.is_dir()]


def _shared_memory() -> list[str]:
    return [str(path) for path in Path("/dev/shm").iterdir()]


def environment() -> dict[str, str]:
    """A clean one, with the surroundings of the test that runs, if it has any."""
    if not _SURROUNDINGS:
        return clean_environment()
    folder = _SURROUNDINGS[-1]
    # Not the extensions of a user's other work, nor theirs of ours.
    return {
        **clean_environment(),
        "TMPDIR": str(folder / "tmp"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


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
        command, env=environment(), capture_output=True, text=True, timeout=timeout_s
    )


def begin(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a launch in a session of its own, its output in a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment(),
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
