"""bench checkpoint: what saving costs training, and how fast it is beside the disk.

Real ranks train a model on random tokens, each with --threads threads, so that a core is free for
writing if there are more. A round is: 20 steps, a save in the background and 20 steps, more until
it is committed, 20 steps, a blocking save, `dd` with fsync of as many bytes, and a load from the
disk. Ratios are taken within a round.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.checkpoint_report import Turn, table
from mamba_dist.commands.bench.data_report import heading
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import MambaConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import CheckpointError

_PACKAGES: Final = ("torch", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="its model section is taken")
    for option, default in (("--d-model", 512), ("--layers", 12), ("--vocab", 8192)):
        parser.add_argument(
            option, type=positive_int, metavar="N", default=default, help=f"default {default}"
        )
    parser.add_argument("--batch", type=positive_int, default=1, help="sequences; default 1")
    parser.add_argument("--length", type=positive_int, default=32, help="tokens; default 32")
    parser.add_argument("--ranks", type=positive_int, default=1, help="processes; default 1")
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="ZeRO; default 1")
    parser.add_argument("--threads", type=positive_int, default=1, help="of a rank; default 1")
    parser.add_argument("--rounds", type=positive_int, default=5, help="default 5")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        default=Path(),
        help="on the disk to measure; a folder in it comes and goes; default here",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the machine or the arguments."""
    if not Path("/proc/self/io").exists():
        return "checkpoint runs on Linux only: bytes read are told by /proc"
    if not arguments.folder.is_dir():
        return f"--folder: {arguments.folder} is no folder; make one"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Prints the table; whether loading read no byte twice.

    Raises:
        ConfigError: the config cannot be used.
        CheckpointError: a rank failed.
    """
    print(heading(words, _PACKAGES), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=arguments.folder) as name:
        turns = _turns(arguments, Path(name).resolve())
    print(table(turns, ranks=arguments.ranks), flush=True)
    if arguments.json is not None:
        text = json.dumps({"command": list(words), "rounds": [vars(turn) for turn in turns]})
        write_text(text + "\n", arguments.json)
    return all(turn.read_bytes < 1.05 * turn.file_bytes for turn in turns)


def _turns(arguments: argparse.Namespace, folder: Path) -> list[Turn]:
    asked = {
        "folder": str(folder),
        "model": _model(arguments).model_dump(),
        **{name: getattr(arguments, name) for name in ("batch", "length", "stage", "threads")},
        "rounds": arguments.rounds,
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    ranks = [
        _start(asked, rank, size=arguments.ranks, port=port) for rank in range(arguments.ranks)
    ]
    try:
        turns = []
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            if line.startswith("{"):
                turns.append(Turn(**json.loads(line)))
                print(f"[{len(turns)}/{arguments.rounds}] {turns[-1]}", file=sys.stderr)
        codes = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(codes) or len(turns) != arguments.rounds:
        raise CheckpointError(f"the ranks ended with {codes}; their last words stand above")
    return turns


def _model(arguments: argparse.Namespace) -> MambaConfig:
    if arguments.config is not None:
        return load_config(arguments.config, []).config.model
    return MambaConfig(
        d_model=arguments.d_model, n_layers=arguments.layers, vocab_size=arguments.vocab
    )


def _start(asked: dict[str, Any], rank: int, *, size: int, port: int) -> "subprocess.Popen[str]":
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": asked["threads"],
    }
    words = [f"{name}={value}" for name, value in launched.items()]
    module = f"{__package__}.checkpoint_worker"
    return subprocess.Popen(
        ["env", *words, sys.executable, "-m", module, json.dumps(asked)],
        stdout=subprocess.PIPE,
        text=True,
    )
