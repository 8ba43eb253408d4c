"""A rank that saves under a watchdog: `saving_rank.py FOLDER TIMEOUT_S FAULT`.

`slow` writes, and waits for other ranks, for longer than the timeout but never stops, and ends by
exit code 0. Of the others the disk takes the save of step 1 and nothing of that of step 2: `stuck`
saves while training waits, and the folder of the stacks cannot be made either; `stuck-beside` goes
on for longer than the timeout, says "trained", and then waits for the save.
"""

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from written_checkpoint import OneRank, fragments_of, snapshot

from mamba_dist.checkpoint import rank_file
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.train import watchdog as watching
from mamba_dist.train.saver import Saver

folder, timeout_s, fault = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
part_s = timeout_s / 4
logging.basicConfig(format="%(message)s")
sync, mkdir = os.fsync, Path.mkdir
blocks, sync_stretch = rank_file._blocks, rank_file._sync_stretch


class Ranks(OneRank):
    """Others that are busy elsewhere for once."""

    busy = False

    def any_rank(self, flag: bool) -> bool:
        time.sleep(1.5 * timeout_s * self.busy)
        self.busy = False
        return flag


def stuck(*_: Any, **__: Any) -> None:
    threading.Event().wait()


def stuck_in_the_writer(file: int) -> None:
    (stuck if threading.current_thread().name == "save" else sync)(file)


def stuck_mkdir(path: Path, *arguments: Any, **options: Any) -> None:
    (stuck if "hangs" in path.parts else mkdir)(path, *arguments, **options)


def slow_blocks(*arguments: Any) -> Any:
    time.sleep(part_s)
    return blocks(*arguments)


def slow_stretch(descriptor: int, start: int) -> None:
    time.sleep(part_s)
    sync_stretch(descriptor, start)


def train(steps: int) -> None:
    for _ in range(steps):
        saver.hear(saver.vote)
        time.sleep(part_s)
        watchdog.beat()


def save(step: int, *, beside: bool) -> None:
    with watchdog.paused():
        saver.save(snapshot(step), must_succeed=not beside)
    watchdog.step_done(step)


ranks = Ranks()
saver = Saver(
    folder, CheckpointConfig(save_mode="async"), fragments=lambda: fragments_of(0), ranks=ranks
)
watchdog = watching.Watchdog(
    folder / "hangs/now", rank=0, timeout_s=timeout_s, peers=[], writing=lambda: saver.writing
)
watching._LEAST_GRACE_S = 0.5
with watchdog:
    watchdog.step_done(1)
    if fault == "slow":
        # 9 tensors, and as many stretches of their file, of which the header takes most.
        rank_file._STARTED_BYTES = 128
        ranks.busy = True
        rank_file._blocks = slow_blocks
        save(1, beside=False)
        rank_file._blocks, rank_file._sync_stretch = blocks, slow_stretch
        save(2, beside=True)
        with watchdog.paused():
            saver.finish()
        sys.exit(0)
    save(1, beside=False)
    if fault == "stuck":
        os.fsync, Path.mkdir = stuck, stuck_mkdir
        save(2, beside=False)
    os.fsync = stuck_in_the_writer
    save(2, beside=True)
    train(6)
    print("trained", flush=True)
    with watchdog.paused():
        saver.finish()
