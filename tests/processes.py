"""Processes as a user starts them: a clean environment, a free port, a script of the repository."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """The environment without anything a launcher or an earlier test may have left in it."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run_script(
    *command: str | Path, cwd: Path, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """A script of the repository as a user starts it, `python script arguments…`."""
    return subprocess.run(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
