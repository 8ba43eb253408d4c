"""The event of a round, done to a launch at its moment."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mamba_dist.checkpoint.layout import checkpoints_folder, committed_steps
from mamba_dist.commands.soak.disk import Disk
from mamba_dist.commands.soak.launch import Launch
from mamba_dist.commands.soak.plan import RoundPlan
from mamba_dist.commands.soak.processes import send

PACE_S: Final = 0.05
"""What a step takes at least, so that an event comes within a step or two of its moment."""
# A write and its fsync take a few milliseconds.
_SAVE_S: Final = 0.02
# Most of the 0.2 MB that a checkpoint takes.
_LEFT_BYTES: Final = 100_000
_START_TIMEOUT_S: Final = 180.0
_EVENT_TIMEOUT_S: Final = 30.0


ENDED_BEFORE: Final = "the launch ended before it"


@dataclass(frozen=True)
class Struck:
    """How an event met its run.

    step: the last one that the run had finished then, None if it had none of its own yet.
    newest: the step of its newest checkpoint then, 0 without any.
    missed: why it could not be done; the launch may have ended before its moment.
    faults: what went wrong while it was done.
    """

    step: int | None
    newest: int
    missed: str | None = None
    faults: tuple[str, ...] = ()


def disturb(
    launch: Launch, plan: RoundPlan, *, run_dir: Path, disk: Disk, start_s: float
) -> Struck:
    """Waits for the moment and does what the plan says; `start_s` is what a start usually takes."""
    if not _wait_for_moment(launch, plan, run_dir=run_dir, start_s=start_s):
        step, newest = launch.last_step(), max(committed_steps(run_dir), default=0)
        if launch.ended:
            return Struck(step, newest, missed=ENDED_BEFORE)
        fault = f"it came to no {plan.moment} within {_START_TIMEOUT_S:.0f} s"
        return Struck(step, newest, missed=fault, faults=(fault,))
    if plan.event.startswith("full disk"):
        return _fill_disk(launch, plan, run_dir=run_dir, disk=disk)
    newest = max(committed_steps(run_dir), default=0)
    step = launch.last_step()
    _strike(launch, plan)
    return Struck(step, newest)


def _wait_for_moment(launch: Launch, plan: RoundPlan, *, run_dir: Path, start_s: float) -> bool:
    if plan.moment == "start":
        due = launch.began_at + plan.fraction * start_s
        return launch.wait_until(lambda: time.monotonic() >= due, timeout_s=_START_TIMEOUT_S)
    after = plan.after_steps
    if not launch.wait_until(lambda: launch.steps_done() >= after, timeout_s=_START_TIMEOUT_S):
        return False
    if plan.moment == "save":
        folder = checkpoints_folder(run_dir)
        if not launch.wait_until(
            # What an earlier launch left is gone since the first step.
            lambda: any(folder.glob("*.partial")),
            timeout_s=_EVENT_TIMEOUT_S,
        ):
            return False
    time.sleep(plan.fraction * (_SAVE_S if plan.moment == "save" else PACE_S))
    return not launch.ended


def _strike(launch: Launch, plan: RoundPlan) -> None:
    ranks = launch.ranks()
    victim = ranks[int(plan.victim * len(ranks)) :][:1] or [launch.process.pid]
    if plan.event == "kill all":
        send(launch.all(), signal.SIGKILL)
    elif plan.event == "kill a rank":
        send(victim, signal.SIGKILL)
    elif plan.event == "stop a rank":
        send(victim, signal.SIGSTOP)
    elif plan.event == "kill the launcher":
        send([launch.process.pid], signal.SIGKILL)
    else:
        number = signal.Signals[plan.event.partition(" ")[0]]
        send([launch.process.pid] if plan.strikes_launcher else victim, number)


def _fill_disk(launch: Launch, plan: RoundPlan, *, run_dir: Path, disk: Disk) -> Struck:
    """The full disk must cost a save and nothing else, until room, a kill or a stop comes."""
    if disk.why_not is not None:
        _strike_as(launch, "SIGTERM")
        return Struck(launch.last_step(), 0, missed=disk.why_not)
    left_bytes = int(plan.fraction * _LEFT_BYTES)

    def refused_when_full() -> bool:
        # Again and again: a save that was nearly done makes room by deleting an old one.
        disk.fill(left_bytes=left_bytes)
        return "checkpoint not written" in launch.log()

    try:
        refused = launch.wait_until(refused_when_full, timeout_s=_EVENT_TIMEOUT_S)
        newest = max(committed_steps(run_dir), default=0)
        faults = [] if refused else ["no save failed on a full disk"]
        if plan.event == "full disk, then room":
            disk.make_room()
            again = launch.wait_until(
                lambda: max(committed_steps(run_dir), default=0) > newest,
                timeout_s=_EVENT_TIMEOUT_S,
            )
            if not again:
                faults.append("no save came through when the disk had room again")
            newest = max(committed_steps(run_dir), default=0)
        step = launch.last_step()
        if plan.event == "full disk, then kill all":
            send(launch.all(), signal.SIGKILL)
        else:
            _strike_as(launch, "SIGTERM")
        launch.wait(timeout_s=_EVENT_TIMEOUT_S)
        return Struck(step, newest, faults=tuple(faults))
    finally:
        disk.make_room()


def _strike_as(launch: Launch, name: str) -> None:
    send(launch.ranks()[:1], signal.Signals[name])
