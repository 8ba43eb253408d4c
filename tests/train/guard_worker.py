"""Real runs on this rank of a world, with faults put into chosen samples of rank 1.

`guard_worker.py CONFIG FOLDER CASE…`: runs CASES in the order given, each in FOLDER/<case>; prints
one JSON line for each: what it said and how it ended.
"""

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mamba_dist.checkpoint.layout import checkpoint_folder
from mamba_dist.config.load import load_config
from mamba_dist.data.segments import RunOrder
from mamba_dist.engine.world import World, start_world, stop_world
from mamba_dist.errors import MambaDistError
from mamba_dist.train.build import Run, build_run, prepare
from mamba_dist.train.loop import train
from mamba_dist.train.run_folder import held_run_folder
from mamba_dist.train.stop import StopRequest

Fault = Callable[[Tensor], Tensor]


def nan_gradient(loss: Tensor) -> Tensor:
    loss = loss.clone()
    if loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


def nan_loss(loss: Tensor) -> Tensor:
    return loss * math.nan


def infinite_loss_alone(loss: Tensor) -> Tensor:
    """As of a label of probability 0: all gradients are finite."""
    return loss + math.inf


def higher_loss_alone(loss: Tensor) -> Tensor:
    return loss + 1000


def larger_gradient(loss: Tensor) -> Tensor:
    return loss * 100 - loss.detach() * 99


@dataclass(frozen=True)
class Case:
    """`faults` by the step (counted from 0) whose samples have it; `broken_from` gives one to all
    samples of a step and later; the steps of `passed_over` are never read; `resumes` a checkpoint
    of another case."""

    overrides: tuple[str, ...] = ()
    faults: dict[int, Fault] = field(default_factory=dict)
    broken_from: int | None = None
    passed_over: range | None = None
    resumes: tuple[str, int] | None = None


ROW = dict.fromkeys((7, 8, 9), nan_loss)
SPIKES = ("training.spike_sigmas=6", "training.spike_window_steps=8")
CASES = {
    "plain": Case(),
    "single": Case(faults={4: nan_gradient, 7: infinite_loss_alone}),
    "spikes": Case(SPIKES, {8: larger_gradient, 9: higher_loss_alone}),
    "spikes-resumed": Case(
        SPIKES, {8: larger_gradient, 9: higher_loss_alone}, resumes=("spikes", 6)
    ),
    "row-resumed": Case(("engine.zero_stage=1",), ROW, resumes=("row-1", 9)),
    "broken": Case(broken_from=7),
    "refused": Case(("training.max_rollbacks=0",), ROW),
    "early": Case(faults=dict.fromkeys((1, 2, 3), nan_loss)),
    **{
        # Loader processes, which have read ahead by then, must not change what is read; and a save
        # within the row must not delete the one before it.
        f"row-{s}": Case(
            (
                f"engine.zero_stage={s}",
                f"data.num_workers={int(s == 1)}",
                f"checkpoint.keep_last={1 if s == 3 else 100}",
            ),
            ROW,
        )
        for s in range(4)
    },
    **{f"never-{s}": Case((f"engine.zero_stage={s}",), passed_over=range(7, 10)) for s in range(4)},
}


def put_into(run: Run, case: Case) -> None:
    """Lets the model's loss have the faults for the samples that this rank reads in their steps."""
    by_rows: dict[bytes, Fault | None] = {}
    now = run.steps.order
    first = RunOrder(now.segments[:1], seed=now.seed, shuffle=now.shuffle)
    faults = dict.fromkeys(range(case.broken_from or 0)) | case.faults
    for step, fault in faults.items():
        run.steps.restart(first, step)
        by_rows |= {batch.input_ids.numpy().tobytes(): fault for batch in next(run.steps)}
    run.steps.restart(now, run.start.step)
    otherwise = None if case.broken_from is None else nan_loss

    def spoil(
        module: nn.Module, inputs: object, named: dict[str, Tensor], loss: Tensor
    ) -> Tensor | None:
        fault = by_rows.get(named["input_ids"].cpu().numpy().tobytes(), otherwise)
        return None if fault is None else fault(loss)

    run.engine.module.register_forward_hook(spoil, with_kwargs=True)


class Said(logging.Handler):
    """Keeps the lines of the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def observe(name: str, config: str, folder: Path, world: World) -> tuple[Run, dict[str, Any]]:
    case, said = CASES[name], Said()
    overrides = [f"training.run_dir={folder / name}", *case.overrides]
    loaded = load_config(Path(config), overrides).config
    logging.getLogger("mamba_dist").addHandler(said)
    ended: dict[str, Any] = {"name": name, "error": None}
    if case.resumes is not None and world.rank == 0:
        other, step = case.resumes
        shutil.copytree(
            checkpoint_folder(folder / other, step), checkpoint_folder(folder / name, step)
        )
    world.barrier()
    with held_run_folder(loaded, world=world) as held:
        prepared = prepare(loaded, ranks=world.size)
        run = build_run(loaded, prepared, world=world, stop=StopRequest())
        if world.rank == 1:
            put_into(run, case)
        if case.passed_over is not None:
            run.steps.restart(run.steps.order.without(case.passed_over), 0)
        try:
            ended["step"] = train(run, held).progress.step
        except MambaDistError as error:
            ended |= {"error": str(error), "exit_code": error.exit_code}
        run.metrics.close()
    logging.getLogger("mamba_dist").removeHandler(said)
    return run, {**ended, "said": said.lines}


def main(config: str, folder: Path, names: Iterable[str]) -> None:
    world = start_world(timeout_minutes=2)
    logging.getLogger("mamba_dist").setLevel(logging.INFO)
    runs = []
    for name in names:
        run, seen = observe(name, config, folder, world)
        # DeepSpeed remembers parameters by id(); those of a collected run could be given to the
        # next.
        runs.append(run)
        print(json.dumps(seen), flush=True)
    stop_world()
    sys.stdout.flush()
    os._exit(0)  # as launch/train.py does, and for the same reason


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
