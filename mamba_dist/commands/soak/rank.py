"""A rank of launch/train.py that notes what it trained on, and takes its time for each step.

`python -m mamba_dist.commands.soak.rank --trained FOLDER --pace SECONDS ARGUMENTS…`: the arguments
are those of launch/train.py, which then runs as it is. After each step, and before anything of it
can be saved, a line with the hashes of the rows that went into the model and the loss over all
ranks goes into FOLDER/rank-N-of-M.jsonl.
"""

import argparse
import hashlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import mamba_dist
from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.data.batch import Batch
from mamba_dist.engine.base import StepStats
from mamba_dist.engine.world import World
from mamba_dist.train import loop, run
from mamba_dist.train.guard import SkipGuard

TRAIN = Path(mamba_dist.__file__).parents[1] / "launch" / "train.py"


class _Notes:
    """Stands between the loop and the model."""

    def __init__(self, folder: Path, pace_s: float) -> None:
        self._folder = folder
        self._pace_s = pace_s
        self._rows: list[str] = []
        self._file = -1

    def install(self) -> None:
        """Takes the place of what the loop calls before and after a step."""
        build_run: Callable[..., Any] = vars(run)["build_run"]
        model_inputs: Callable[[Batch], dict[str, Tensor]] = vars(loop)["model_inputs"]
        noted = SkipGuard.noted

        def opened_build_run(*arguments: Any, world: World, **options: Any) -> Any:
            self._open(world)
            return build_run(*arguments, world=world, **options)

        def noted_model_inputs(batch: Batch) -> dict[str, Tensor]:
            inputs = model_inputs(batch)
            self._rows += _row_hashes(inputs)
            return inputs

        def noted_step(
            guard: SkipGuard, progress: Progress, *, loss: float, stats: StepStats
        ) -> Progress:
            self._write(progress.step, loss)
            return noted(guard, progress, loss=loss, stats=stats)

        _replace(run, "build_run", opened_build_run)
        _replace(loop, "model_inputs", noted_model_inputs)
        _replace(SkipGuard, "noted", noted_step)

    def _open(self, world: World) -> None:
        path = self._folder / f"rank-{world.rank}-of-{world.size}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _write(self, step: int, loss: float) -> None:
        line = json.dumps({"step": step, "rows": self._rows, "loss": loss})
        # In one piece, or not at all if the process is killed.
        os.write(self._file, line.encode() + b"\n")
        self._rows = []
        time.sleep(self._pace_s)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)


def _row_hashes(inputs: dict[str, Tensor]) -> list[str]:
    arrays = [inputs[name].cpu().numpy() for name in sorted(inputs)]
    return [
        hashlib.blake2b(
            b"".join(array[row].tobytes() for array in arrays), digest_size=8
        ).hexdigest()
        for row in range(len(arrays[0]))
    ]


def main() -> None:
    """Runs launch/train.py, which ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--pace", type=float, required=True)
    arguments, others = parser.parse_known_args()
    _Notes(arguments.trained, arguments.pace).install()
    sys.argv = [str(TRAIN), *others]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
