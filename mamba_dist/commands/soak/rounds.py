"""The soaked run itself: one round after another in one folder, then its end."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mamba_dist.commands.soak.checks import Seen, faults_of, resumed_step
from mamba_dist.commands.soak.comparison import RankTrace, read_traces
from mamba_dist.commands.soak.damage import damage_newest, leave_junk
from mamba_dist.commands.soak.disk import Disk
from mamba_dist.commands.soak.disturbance import PACE_S, disturb
from mamba_dist.commands.soak.launch import Launch, Spread
from mamba_dist.commands.soak.leftovers import Leftovers
from mamba_dist.commands.soak.plan import RoundPlan
from mamba_dist.commands.soak.processes import wait_for_end
from mamba_dist.commands.soak.second_start import second_start_faults
from mamba_dist.commands.soak.survey import Survey, clear_for_a_person, survey

_HANG_TIMEOUT_S: Final = 4.0
# Launchers give their ranks 30 s after a signal.
_END_TIMEOUT_S: Final = 90.0
_ORPHAN_TIMEOUT_S: Final = 45.0
FEWEST_WHOLE: Final = 2
"""So many whole checkpoints there must be before one is damaged, as a run without any is lost."""


@dataclass(frozen=True)
class RoundResult:
    """What happened in a round."""

    plan: RoundPlan
    code: int | None
    resumed: int | None
    last_step: int | None
    whole: tuple[int, ...]
    passed_over: tuple[int, ...]
    missed: str | None
    seconds: float
    faults: tuple[str, ...]
    before: str = ""
    """What was done to the folder before the launch, or could not be."""


@dataclass
class SoakedRun:
    """The run folder and what the rounds need to remember of it.

    damaged: files that were damaged and that no start has found yet, by step.
    """

    folder: Path
    config: Path
    run_dir: Path
    disk: Disk
    total_steps: int
    start_s: float
    traces: list[RankTrace] = field(default_factory=list)
    damaged: dict[int, Path] = field(default_factory=dict)

    def round(self, plan: RoundPlan) -> RoundResult:
        """Plays one round."""
        began_at = time.monotonic()
        before, done = self._prepare(plan)
        leftovers = Leftovers()
        hang_timeout_s = _HANG_TIMEOUT_S if plan.event == "stop a rank" else None
        spread = Spread(
            plan.launcher,
            plan.ranks,
            plan.engine,
            plan.loaders,
            plan.accumulates,
            hang_timeout_s,
        )
        name = f"round-{plan.number:04}"
        launch = Launch(self.folder / "launches" / name, self.config, spread, pace_s=PACE_S)
        try:
            more: list[str] = []
            if plan.started_twice:
                more = second_start_faults(launch, self.config)
            struck = disturb(
                launch, plan, run_dir=self.run_dir, disk=self.disk, start_s=self.start_s
            )
            code, unended = self._end_of(launch)
            more += unended
        finally:
            launch.end()
        more += leftovers.faults(launch.temporary)
        traces = read_traces(launch.trained, launch=name)
        self.traces += traces
        firsts = [trace.steps[0].step for trace in traces if trace.steps]
        log, first_step = launch.log(), min(firsts, default=None)
        after = survey(self.run_dir)
        seen = Seen(
            plan=plan,
            struck=struck,
            code=-99 if code is None else code,
            log=log,
            before=before,
            after=after,
            damaged=dict(self.damaged),
            first_step=first_step,
            resumed=resumed_step(log, first_step),
            total_steps=self.total_steps,
        )
        passed_over = tuple(s for s in self.damaged if f"passing over step {s}: " in log)
        self.damaged = {s: path for s, path in self.damaged.items() if s in after.damaged}
        clear_for_a_person(self.run_dir)
        return RoundResult(
            plan=plan,
            code=code,
            resumed=seen.resumed,
            last_step=launch.last_step(),
            whole=tuple(after.whole),
            passed_over=passed_over,
            missed=struck.missed,
            seconds=time.monotonic() - began_at,
            faults=(*more, *faults_of(seen)),
            before=done,
        )

    def finish(self, spread: Spread) -> tuple[int | None, list[str]]:
        """The exit code of an undisturbed launch to the last step, and what is wrong after it."""
        launch = Launch(self.folder / "launches" / "last", self.config, spread)
        leftovers = Leftovers()
        try:
            code = launch.wait(timeout_s=600)
            left = wait_for_end(launch.marker, timeout_s=_ORPHAN_TIMEOUT_S)
        finally:
            launch.end()
        self.traces += read_traces(launch.trained, launch="last")
        after = survey(self.run_dir)
        faults = leftovers.faults(launch.temporary)
        if code != 0:
            faults.append(f"the last launch ended with {code}: {launch.log()[-500:]}")
        if left or after.left_behind or after.damaged or after.committed != self.total_steps:
            faults.append(
                f"after the last launch: processes {left}, unfinished {after.left_behind}, damaged "
                f"{after.damaged}, newest whole {after.committed} of {self.total_steps}"
            )
        return code, faults

    def _end_of(self, launch: Launch) -> tuple[int | None, list[str]]:
        """The exit code of a launch that was struck, and what of it does not end."""
        code = launch.wait(timeout_s=_END_TIMEOUT_S)
        # Ranks whose launcher died in their start notice it when they have started.
        patience_s = _ORPHAN_TIMEOUT_S + 3 * self.start_s
        faults = []
        if code is None:
            faults.append(f"still at work {_END_TIMEOUT_S:.0f} s after the event")
        if left := wait_for_end(launch.marker, timeout_s=patience_s):
            faults.append(
                f"{len(left)} processes are left {patience_s:.0f} s after its end, at step "
                f"{launch.last_step()}: {left}"
            )
        return code, faults

    def _prepare(self, plan: RoundPlan) -> tuple[Survey, str]:
        found, done = survey(self.run_dir), []
        if plan.junk:
            leave_junk(self.run_dir, found.whole)
            done.append("junk")
        if plan.damage is not None:
            if found.written:
                # The start goes on from it, and looks at none before.
                done.append(f"not done: {plan.damage.kind} (to be committed: {found.written})")
            elif len(found.whole) < FEWEST_WHOLE:
                done.append(f"not done: {plan.damage.kind} (whole: {len(found.whole)})")
            else:
                step, path = damage_newest(self.run_dir, found.whole, plan.damage)
                self.damaged[step] = path
                done.append(f"{plan.damage.kind} in {step}/{path.name}")
        return (survey(self.run_dir) if done else found), ", ".join(done)


def losses_told(
    records: list[dict[str, float | None]], *, name: str = "loss"
) -> Mapping[int, float]:
    """The loss, or the `val_loss`, of each step in metrics.jsonl, the later line counting."""
    return {
        int(record["step"] or 0): float("nan") if (loss := record[name]) is None else loss
        for record in records
        if name in record
    }
