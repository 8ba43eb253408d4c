"""What tests of several folders need: real ranks as real processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunRanks = Callable[..., list[str]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """The environment without anything a launcher or an earlier test may have left in it."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_ranks() -> RunRanks:
    """Runs a worker script on gloo ranks; returns what each printed, fails if a rank fails."""

    def run(script: Path, *arguments: str, world_size: int, timeout_s: float = 280) -> list[str]:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env={
                    **clean_environment(),
                    **meeting,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=timeout_s) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        failed = [
            f"rank {i} ended with {rank.returncode}:\n{outputs[i][1][-4000:]}"
            for i, rank in enumerate(ranks)
            if rank.returncode
        ]
        assert not failed, "\n".join(failed)
        return [out for out, _ in outputs]

    return run
