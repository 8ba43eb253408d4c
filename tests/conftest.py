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


ROOT = Path(__file__).parents[1]


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/, tokenizer.json and shards/, made by the real commands."""
    folder = tmp_path_factory.mktemp("tiny")
    corpus = folder / "corpus"
    corpus.mkdir()
    words = ["state", "space", "scan", "gate", "token", "delta", "layer", "norm", "rank", "shard"]
    for document in range(60):
        lines = [
            " ".join(words[(document * 7 + line * 3 + k * (line % 4 + 1)) % 10] for k in range(9))
            for line in range(30)
        ]
        (corpus / f"text-{document:02d}.txt").write_text("\n".join(lines) + "\n")
    steps = [
        (
            "tools/train_tokenizer.py",
            "corpus",
            "--vocab-size",
            "300",
            "--output",
            "tokenizer.json",
        ),
        (
            "data_prep/tokenize.py",
            "corpus",
            "--tokenizer",
            "tokenizer.json",
            "--output",
            "shards",
            "--workers",
            "1",
        ),
    ]
    for step in steps:
        result = run_script(*step, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder
