"""A real run whose copies and writers are slow, and whose rank 1 fails once and is told to stop.

`saving_worker.py CONFIG FOLDER`: leaves in FOLDER/rank-N.json, by step, the SHA-256 of what the
rank's state was when it was saved.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mamba_dist.checkpoint import rank_file
from mamba_dist.checkpoint.host_copy import HostCopy
from mamba_dist.checkpoint.store import Snapshot
from mamba_dist.config.load import load_config
from mamba_dist.engine.base import STATE_KINDS
from mamba_dist.train.run import run_training
from mamba_dist.train.saver import Saver

RANK = int(os.environ["RANK"])
FAILING_STEP = 4
STOPPED_STEP = 8
# Longer than the forward pass that the copy is beside.
SLOW_S = 0.3

saved: dict[int, list[list[object]]] = {}
save, complete, write_tensors = Saver.save, HostCopy.complete, rank_file.write_tensors


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().numpy()).hexdigest()


def noted_save(self: Saver, snapshot: Snapshot, *, must_succeed: bool) -> None:
    step = snapshot.progress.step
    saved[step] = [
        [
            one.name,
            one.start,
            *(digest(one.tensor(k)) for k in STATE_KINDS),
        ]
        for one in self._fragments()
    ]
    save(self, snapshot, must_succeed=must_succeed)
    if RANK == 1 and step == STOPPED_STEP:
        os.kill(os.getpid(), signal.SIGTERM)


def slow_complete(self: HostCopy) -> None:
    time.sleep(SLOW_S)
    complete(self)
    time.sleep(SLOW_S)


def failing_write(path: Path, *arguments: Any, **options: Any) -> Any:
    if RANK == 1 and f"{FAILING_STEP:08d}" in str(path):
        raise OSError(28, "No space left on device")
    return write_tensors(path, *arguments, **options)


Saver.save = noted_save
HostCopy.complete = slow_complete
rank_file.write_tensors = failing_write
code = run_training(load_config(sys.argv[1], []).config)
(Path(sys.argv[2]) / f"rank-{RANK}.json").write_text(json.dumps(saved))
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as launch/train.py does, and for the same reason
