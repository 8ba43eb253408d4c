"""Runs of two ranks that are killed at places of a save, one life after the other in one folder.

`kill_worker.py WHOLE.yaml BROKEN.yaml LOG PLACE…` imports everything once and forks two ranks for
each life, so that a life costs its training alone. WHOLE is trained to its end. BROKEN is killed at
each of the places, by their number in the table below, started again each time, and in the end
trained to its end. Prints one JSON line per life of BROKEN: how its ranks ended, and what lay in
the folder of its checkpoints.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import free_port

from mamba_dist.config.load import load_config
from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import MambaDistError
from mamba_dist.train.run import run_training

RANKS = 2
# (rank, change, end of the path, whether all ranks die): in a rank's file before it is forced to
# the disk, just before the commit, just after it, and in the middle of a deletion.
PLACES: list[tuple[int, str, str, bool]] = [
    (1, "fsync", "step-00000002.partial/rank-00001.safetensors", False),
    (0, "rename", "step-00000004.partial", True),
    (0, "committed", "step-00000006", False),
    (0, "unlink", "step-00000006.removed/rank-00000.safetensors", True),
]


def strike_at(change: str, end: str, victims: list[int]) -> None:
    """Kills those processes, and then this one, just before it makes that change."""

    def strike(made: str, path: str) -> None:
        if made == change and path.endswith(end):
            for victim in [*victims, os.getpid()]:
                os.kill(victim, signal.SIGKILL)

    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def struck_fsync(descriptor: int) -> None:
        strike("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def struck_rename(old: Path, new: Path) -> None:
        strike("rename", str(old))
        rename(old, new)
        strike("committed", str(new))

    def struck_unlink(name: str, *, dir_fd: int | None = None) -> None:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        strike("unlink", f"{folder}/{name}")
        unlink(name, dir_fd=dir_fd)

    os.fsync, os.rename, os.unlink = struck_fsync, struck_rename, struck_unlink


def forked(rank: int, port: int, log: Path, work: Callable[[], int]) -> int:
    """The pid of a rank that does `work`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(RANKS),
            LOCAL_WORLD_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        code = work()
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def live(config: RunConfig, log: Path, place: tuple[int, str, str, bool] | None) -> list[int]:
    """How each rank ended: its exit code, or minus the signal that killed it."""

    port, pids = free_port(), {}

    def work(rank: int) -> int:
        if place is not None and rank == place[0]:
            strike_at(place[1], place[2], list(pids.values()) if place[3] else [])
        return run_training(config)

    # Rank 0 is the last, so that it knows whom to take along.
    for rank in reversed(range(RANKS)):
        pids[rank] = forked(rank, port, log, lambda rank=rank: work(rank))
    return [os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1]) for rank in range(RANKS)]


def main() -> None:
    whole, broken, log = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    sys.stdout.flush()
    endings = live(load_config(whole, []).config, log, None)
    assert endings == [0] * RANKS, endings
    config = load_config(broken, []).config
    assert config.training.run_dir is not None
    folder = Path(config.training.run_dir) / "checkpoints"
    for place in [*(PLACES[int(word)] for word in sys.argv[4:]), None]:
        endings = live(config, log, place)
        left = sorted(entry.name for entry in folder.iterdir())
        said: dict[str, Any] = {"endings": endings, "left": left}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
