"""What tests of several folders need: real ranks as real processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import clean_environment, free_port, run_script

# Two threads take up to 20 times as long as one for the small tensors here: they wait for each
# other at every operation. What threads could change is tested with one, two and three by name.
# Read when torch is imported, by this process and by those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RunRanks = Callable[..., list[str]]


@pytest.fixture(scope="session")
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
