"""tools/soak.py: trains while everything goes wrong, and compares with a run left alone.

A round is one launch in the folder of one run: a few steps, then an event (a kill, a signal, a rank
that stops, a full disk) at a step, in a save or in the start, by a schedule that the seed alone
makes; before some of them a file of the newest checkpoint is damaged.

The run is as long as 8 steps for each round and 40. A round is struck within 12 steps or so, goes
on until it notices, and keeps what it saved, about 5 steps as a mean: so the run does not end
before the rounds do. What is left of it then is trained in one last launch that is left alone.
Every step, also one that is trained again, must have read the samples that the undisturbed run of
one rank read, to the same loss; validation losses and the weights at the end are compared too.

On GPUs its launches need four of them.

Without root no small disk can be mounted, and full disks count as not done; `unshare -rm python
tools/soak.py …` makes it possible where user namespaces are allowed.

Exit codes: 0 all held; 1 something did not, and the folder is kept; 2 a mistake that the message
explains; 130 interrupted; anything else is a crash.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Final

from mamba_dist.commands.arguments import not_negative_int, positive_int
from mamba_dist.commands.machine import this_machine
from mamba_dist.commands.soak.comparison import (
    Comparison,
    compare,
    compare_validations,
    read_traces,
)
from mamba_dist.commands.soak.disk import small_disk
from mamba_dist.commands.soak.launch import Launch, Spread
from mamba_dist.commands.soak.made_run import make_data, write_config
from mamba_dist.commands.soak.plan import schedule
from mamba_dist.commands.soak.report import round_line, summary
from mamba_dist.commands.soak.rounds import RoundResult, SoakedRun, losses_told
from mamba_dist.commands.soak.weights import weight_difference
from mamba_dist.config.text import write_text
from mamba_dist.errors import MambaDistError, TrainingError
from mamba_dist.telemetry.metrics import read_metrics

EXIT_WRONG: Final = 1
EXIT_USER_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130
STEPS_PER_ROUND: Final = 8
_STEPS_MORE: Final = 40
LOSS_TOLERANCE: Final = 1e-5
"""Nats per token. fp32 sums over ranks in another order are 3e-7 away (440 steps of 40 rounds); a
run that took up other moments, or one sample too many, is 0.1 away."""
WEIGHT_TOLERANCE: Final = 1e-5
"""L2 of the difference of all weights over theirs: 1e-7, and 2e-3, in the same runs."""
_WHOLE_TIMEOUT_S: Final = 900.0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    plans = list(islice(schedule(arguments.seed), arguments.rounds))
    if arguments.dry_run:
        for plan in plans:
            print(f"{plan.number:4} {plan}")
        return 0
    folder: Path = arguments.folder.resolve()
    try:
        if folder.exists() and any(folder.iterdir()):
            raise TrainingError(f"--folder {folder} is not empty; name one that does not exist yet")
        with _ended_like_ctrl_c():
            return _soak(arguments, folder)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"interrupted; what there is stands in {folder}", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """A SIGTERM too ends the launch at work and unmounts the disk.

    A SIGINT is not ignored meanwhile: what a shell starts in the background ignores it, and so
    would the launchers, to which some rounds send it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _soak(arguments: argparse.Namespace, folder: Path) -> int:
    began_at = time.monotonic()
    print(f"machine    {this_machine()}", flush=True)
    total = arguments.rounds * STEPS_PER_ROUND + _STEPS_MORE
    shards = make_data(folder / "data", seed=arguments.seed)
    whole_dir = folder / "undisturbed" / "run"
    whole = write_config(
        folder / "undisturbed.yaml",
        shards=shards,
        run_dir=whole_dir,
        steps=total,
        seed=arguments.seed,
    )
    with small_disk(folder / "disk") as disk:
        if disk.why_not is not None:
            print(f"note: full disks are not done: {disk.why_not}", flush=True)
        start_s = _train_undisturbed(folder, whole)
        print(f"undisturbed {total} steps; a start takes {start_s:.1f} s", flush=True)
        run_dir = disk.folder / "run"
        config = write_config(
            folder / "soaked.yaml",
            shards=shards,
            run_dir=run_dir,
            steps=total,
            seed=arguments.seed,
        )
        run = SoakedRun(folder, config, run_dir, disk, total, start_s)
        results = _play(run, arguments)
        _, faults = run.finish(Spread("python", 1, "zero-0"))
        comparison = _compare(run, folder, whole_dir)
        weights = weight_difference(whole_dir, run_dir, step=total)
    faults += comparison.faults
    faults += weights.faults(WEIGHT_TOLERANCE)
    said = summary(
        results,
        comparison,
        faults,
        weights=weights.relative_l2,
        tolerances=(LOSS_TOLERANCE, WEIGHT_TOLERANCE),
        seconds=time.monotonic() - began_at,
    )
    print(said.text, flush=True)
    if arguments.json is not None:
        record = {"seed": arguments.seed, "rounds": [asdict(one) for one in results], **said.record}
        write_text(json.dumps(record, default=str) + "\n", arguments.json)
    if said.held and not arguments.keep:
        shutil.rmtree(folder)
    else:
        print(f"kept       {folder}", flush=True)
    return 0 if said.held else EXIT_WRONG


def _play(run: SoakedRun, arguments: argparse.Namespace) -> list[RoundResult]:
    results = []
    for plan in islice(schedule(arguments.seed), arguments.rounds):
        result = run.round(plan)
        results.append(result)
        print(round_line(result, rounds=arguments.rounds), flush=True)
    return results


def _train_undisturbed(folder: Path, config: Path) -> float:
    """Seconds to its first step.

    Raises:
        TrainingError: not even this run came to its end.
    """
    launch = Launch(folder / "launches" / "undisturbed", config, Spread("python", 1, "zero-0"))
    try:
        launch.wait_until(lambda: launch.steps_done() >= 1, timeout_s=_WHOLE_TIMEOUT_S)
        start_s = time.monotonic() - launch.began_at
        code = launch.wait(timeout_s=_WHOLE_TIMEOUT_S)
    finally:
        launch.end()
    if code != 0:
        raise TrainingError(
            f"the undisturbed run ended with {code}: {launch.log()[-1000:]}; see {launch.folder}"
        )
    return start_s


def _compare(run: SoakedRun, folder: Path, whole_dir: Path) -> Comparison:
    [trace] = read_traces(folder / "launches" / "undisturbed" / "trained", launch="undisturbed")
    comparison = compare(
        {one.step: one for one in trace.steps},
        run.traces,
        metrics=losses_told(read_metrics(run.run_dir)),
        total_steps=run.total_steps,
        tolerance=LOSS_TOLERANCE,
    )
    told = losses_told(read_metrics(whole_dir))
    compare_validations(
        losses_told(read_metrics(whole_dir), name="val_loss"),
        losses_told(read_metrics(run.run_dir), name="val_loss"),
        tolerance=LOSS_TOLERANCE,
        found=comparison,
    )
    if any(told.get(one.step) != one.loss for one in trace.steps):
        comparison.faults.append("metrics.jsonl of the undisturbed run gives other losses")
    return comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/soak.py",
        description="Train a tiny model while ranks and launchers are killed, disks fill up and "
        "files are damaged, and compare every step with an undisturbed run.",
    )
    parser.add_argument("--rounds", type=positive_int, default=100, help="default 100")
    parser.add_argument(
        "--seed", type=not_negative_int, default=0, help="of data, weights and schedule; default 0"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/soak"),
        metavar="DIR",
        help="made, and removed if all held; default runs/soak",
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results there")
    parser.add_argument("--dry-run", action="store_true", help="only print the schedule")
    return parser
