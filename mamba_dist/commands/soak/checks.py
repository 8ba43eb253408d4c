"""What must hold after each round, whatever was done in it; each failure is one line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mamba_dist.checkpoint.layout import checkpoint_folder, staging_folder
from mamba_dist.commands.soak.disturbance import ENDED_BEFORE, Struck
from mamba_dist.commands.soak.made_run import KEEP_LAST
from mamba_dist.commands.soak.plan import RoundPlan
from mamba_dist.commands.soak.survey import Survey
from mamba_dist.train.stop import EXIT_STOPPED

_CRASHED: Final = 1
_TOLD: Final = 2
_KILLED: Final = -9
# Ranks look after their launcher twice a second, and a step takes a twentieth of one at least.
_NOTICED_WITHIN_STEPS: Final = 100
# A rank that is told itself brings it to the next step's vote.
_HEARD_WITHIN_STEPS: Final = 10
# By its number as a process that is gone has it, and as a launcher passes it on.
_SIGNALS: Final = {"SIGTERM": (-15, 143, 241), "SIGINT": (-2, 130, 254), "SIGUSR1": (-10, 246)}


@dataclass(frozen=True)
class Seen:
    """A launch that is over.

    code: of the command. before, after: the run folder at its start and now. damaged: files that
    the soak has damaged and no start has found yet, by step. resumed: the step that it says to go
    on from, 0 where it began afresh, None if it came to neither.
    """

    plan: RoundPlan
    struck: Struck
    code: int
    log: str
    before: Survey
    after: Survey
    damaged: Mapping[int, Path]
    first_step: int | None
    resumed: int | None
    total_steps: int


def resumed_step(log: str, first_step: int | None) -> int | None:
    """The step that a launch went on from, 0 where it began afresh; None if it did not come so far.

    `first_step` is the first that it trained.
    """
    found = re.search(r"resumed after step (\d+) from", log)
    if found:
        return int(found[1])
    return 0 if first_step is not None else None


def faults_of(seen: Seen) -> list[str]:
    """All that is wrong with a round."""
    return [
        *seen.struck.faults,
        *_exit_faults(seen),
        *_resume_faults(seen),
        *_checkpoint_faults(seen),
        *_stop_faults(seen),
    ]


def allowed_codes(plan: RoundPlan, *, stepped: bool, done: bool) -> set[int]:
    """Exit codes of the command that the contract of launch/train.py and its launchers allow.

    `stepped`: the launch had finished a step before the event. `done`: the event was done.
    """
    if not done:
        # The full disk that could not be made: a plain stop instead.
        event, signalled = "SIGTERM to a rank", "SIGTERM"
    else:
        event, signalled = plan.event, plan.event.partition(" ")[0]
    if plan.strikes_launcher:
        if event == "kill the launcher":
            return {_KILLED}
        # It passes the signal on, or dies of it.
        return {_CRASHED, *_SIGNALS[signalled]}
    if event in ("kill all", "full disk, then kill all"):
        return {_KILLED}
    if event == "kill a rank":
        # The launcher looks once a second: the victim's end, or that of one that missed it.
        own = {_KILLED} if plan.launcher == "python" else {247, _CRASHED, _TOLD}
    else:
        # Also one whose last save had no room: the next start goes on from the one before.
        own = {EXIT_STOPPED}
    if plan.launcher == "torchrun":
        # Its own code is 1, whatever the ranks ended with.
        own = {_CRASHED}
    if not stepped:
        # Python had not come to our handlers yet, or the launcher was struck, having no ranks yet.
        own |= {_KILLED} if event == "kill a rank" else {_CRASHED, *_SIGNALS.get(signalled, ())}
    return own


def _exit_faults(seen: Seen) -> list[str]:
    missed = seen.struck.missed is not None
    if seen.code == 0:
        if f"finished at step {seen.total_steps}" not in seen.log:
            return ["exit code 0 before the last step of the run"]
        more = seen.total_steps - (seen.struck.step or seen.before.newest)
        most = _NOTICED_WITHIN_STEPS if seen.plan.strikes_launcher else _HEARD_WITHIN_STEPS
        late = more > most and seen.struck.missed != ENDED_BEFORE
        return [f"trained {more} steps to its end after the event"] * late
    if seen.struck.missed == ENDED_BEFORE:
        return [f"it ended by itself with exit code {seen.code}"]
    allowed = allowed_codes(seen.plan, stepped=seen.struck.step is not None, done=not missed)
    if seen.code not in allowed:
        return [f"exit code {seen.code}, allowed are {sorted(allowed)}"]
    if seen.plan.event == "stop a rank" and "the run hangs" not in seen.log:
        return ["a stopped rank was found by nobody"]
    return []


def _resume_faults(seen: Seen) -> list[str]:
    if seen.resumed is None:
        return []
    faults = []
    if seen.resumed != seen.before.newest:
        faults.append(
            f"went on from step {seen.resumed}, the newest whole or written checkpoint was of "
            f"{seen.before.newest}"
        )
    if seen.first_step is not None and seen.first_step != seen.resumed + 1:
        faults.append(f"went on from step {seen.resumed}, and trained {seen.first_step} first")
    for step, path in seen.damaged.items():
        told = [x for x in seen.log.splitlines() if f"passing over step {step}: " in x]
        if not any(str(path) in line for line in told):
            faults.append(f"passed over step {step} without naming {path.name}: {told[:1]}")
    finished = {
        staging_folder(Path(), step).name: checkpoint_folder(Path(), step).name
        for step in seen.before.written
    }
    for name in seen.before.left_behind:
        # A later save of the same step may have been interrupted as well.
        said = (
            f"/{finished[name]}, all of which an interrupted save left"
            if name in finished
            else f"removed {name}, which an interrupted save left behind"
        )
        if said not in seen.log:
            faults.append(f"began with {name} in its folder, and does not say: {said}")
    return faults


def _checkpoint_faults(seen: Seen) -> list[str]:
    before, after = seen.before, seen.after
    faults = [
        f"the checkpoint of step {step} is damaged, and not by the soak: {fault}"
        for step, fault in after.damaged.items()
        if step not in seen.damaged
    ]
    for step, manifest in before.whole.items():
        newer = [s for s in after.whole if s > step]
        if step not in after.whole:
            if len(newer) < KEEP_LAST:
                faults.append(f"the whole checkpoint of step {step} is gone, newer: {newer}")
        elif after.whole[step] != manifest:
            faults.append(f"the whole checkpoint of step {step} was written again")
    # A damaged one may still have been there when the event came.
    during = 0 if seen.struck.newest in seen.damaged else seen.struck.newest
    if after.newest < max(before.newest, during):
        faults.append(
            f"the newest whole checkpoint is of step {after.newest}, it was of "
            f"{max(before.newest, during)}"
        )
    return faults


def _stop_faults(seen: Seen) -> list[str]:
    """A run that was told to stop leaves all that it had trained."""
    event, step = seen.plan.event, seen.struck.step
    asked = event.startswith("SIG") or event in ("kill the launcher", "full disk, then room")
    if asked and step is not None and seen.after.committed < step:
        left = seen.after.committed
        return [f"was told to stop after step {step}, and left a checkpoint of {left}"]
    return []
