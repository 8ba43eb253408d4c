"""Interleaved measurement: the variants take turns, and only quiet rounds count.

A round is one turn of each variant, A B C; a turn is some steps in a row. Ratios are taken within
a round, between turns that lie seconds apart, and then their median over the rounds: a machine
that slows down for minutes slows both sides.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from mamba_dist.commands.bench.load import cpu_times, other_load_cores
from mamba_dist.commands.bench.spec import NotMeasuredError, Outcome, Worker
from mamba_dist.ops.agreement import worst

_Answer = TypeVar("_Answer")

MIN_ROUNDS: Final = 3
_MAX_ROUNDS: Final = 60
# /proc counts in hundredths of a second, so a shorter turn could not tell what else ran.
_TURN_S: Final = 0.5
_MAX_STEPS: Final = 500
# A step that takes longer is not repeated just to see how long it takes when warm.
_LONG_STEP_S: Final = 5.0
# A variant whose step takes more than this share of the budget, and so many times as long as the
# quickest one's, comes MIN_ROUNDS times and no more: it would leave no time for the others.
_SLOW_SHARE: Final = 0.1
_SLOW_FACTOR: Final = 4.0


@dataclass(frozen=True)
class Plan:
    """How long to measure, and what counts as quiet."""

    seconds: float
    """Budget; MIN_ROUNDS rounds are done in any case."""
    max_other_load: float
    """Cores; rounds with a busier turn are dropped and repeated."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """All three as in "{:.2f}"."""
        return f"{form.format(self.median)} ({form.format(self.low)} to {form.format(self.high)})"

    def scaled(self, factor: float) -> "Spread":
        """In another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Round:
    """Median step of each variant's turn, and the other load of the busiest turn."""

    step_s: Mapping[str, float]
    other_load: float


@dataclass(frozen=True)
class Result:
    """A group of variants that were measured together.

    rounds: those that count. dropped: how many did not. quiet: whether all that count were quiet;
    if too few were, the least busy ones count.
    absent, wrong: variants without figures and why; they could not run, or their results are wrong.
    """

    rounds: Sequence[Round]
    dropped: int
    quiet: bool
    outcomes: Mapping[str, Outcome]
    absent: Mapping[str, str]
    wrong: Mapping[str, str]

    def measured(self, variant: str) -> bool:
        """Whether there are figures for it."""
        without = {*self.absent, *self.wrong}
        return variant not in without and any(variant in r.step_s for r in self.rounds)

    def step_s(self, variant: str) -> Spread:
        """Seconds of one step."""
        return Spread.of([r.step_s[variant] for r in self.rounds if variant in r.step_s])

    def ratio(self, variant: str, other: str) -> Spread:
        """Step time of `variant` over that of `other`, within rounds."""
        return Spread.of(
            [
                r.step_s[variant] / r.step_s[other]
                for r in self.rounds
                if variant in r.step_s and other in r.step_s
            ]
        )


def run_in_turns(workers: Mapping[str, Worker], plan: Plan) -> Result:
    """Figures of all workers that can run here and whose results are right; closes them."""
    with ExitStack() as stack:
        for worker in workers.values():
            stack.callback(worker.close)
        session = _Session(dict(workers), plan)
        session.start()
        rounds = session.rounds()
        outcomes = session.finish()
    used, quiet = _used(rounds, plan)
    wrong = {name: text for name, o in outcomes.items() if (text := _objection(o))}
    absent = session.absent | {
        name: "no round that counts had it; give more --seconds or a quieter machine"
        for name in outcomes
        if not any(name in r.step_s for r in used)
    }
    return Result(used, len(rounds) - len(used), quiet, outcomes, absent, wrong)


class _Session:
    """The workers that still run, and why the others don't."""

    def __init__(self, workers: dict[str, Worker], plan: Plan) -> None:
        self.absent: dict[str, str] = {}
        self._running = workers
        self._plan = plan
        self._pids = [worker.pid for worker in workers.values()]
        self._steps_per_turn: dict[str, int] = {}
        self._slow: set[str] = set()

    def start(self) -> None:
        """Builds and warms all of them, and sees how many steps make a turn."""
        slow_s = _SLOW_SHARE * self._plan.seconds
        warm_s: dict[str, float] = {}
        for name, worker in list(self._running.items()):
            step_s = self._told(name, partial(_warm_step_s, worker))
            if step_s is not None:
                warm_s[name] = step_s
        quickest_s = min(warm_s.values(), default=0.0)
        for name, step_s in warm_s.items():
            steps = math.ceil(min(_TURN_S, slow_s) / step_s)
            self._steps_per_turn[name] = min(_MAX_STEPS, max(1, steps))
            if step_s > max(slow_s, _TURN_S, _SLOW_FACTOR * quickest_s):
                self._slow.add(name)

    def rounds(self) -> list[Round]:
        """Rounds until the budget is spent and enough of them were quiet, or too many were not."""
        ends_at = time.monotonic() + self._plan.seconds
        found: list[Round] = []
        while self._running and len(found) < _MAX_ROUNDS:
            quiet = sum(r.other_load <= self._plan.max_other_load for r in found)
            late = time.monotonic() >= ends_at
            if late and (quiet >= MIN_ROUNDS or len(found) - quiet >= 2 * MIN_ROUNDS):
                break
            # Dropped rounds are repeated with the slow ones too, up to a bound.
            with_slow = quiet < MIN_ROUNDS and len(found) < 2 * MIN_ROUNDS
            present = [n for n in self._running if with_slow or n not in self._slow]
            if not present:
                break
            found.append(self._round(present))
        return found

    def finish(self) -> dict[str, Outcome]:
        """What each of them knows at its end."""
        outcomes = {
            name: self._told(name, worker.finish) for name, worker in list(self._running.items())
        }
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}

    def _round(self, present: Sequence[str]) -> Round:
        step_s: dict[str, float] = {}
        busiest = 0.0
        for name in present:
            count = self._steps_per_turn[name]
            # The first step after the others' turns finds caches cold and threads asleep.
            cold = 1 if count > 1 else 0
            before = cpu_times(self._pids)
            seconds = self._told(name, partial(self._running[name].steps, count + cold))
            if seconds is not None:
                step_s[name] = statistics.median(seconds[cold:])
            busiest = max(busiest, other_load_cores(before, cpu_times(self._pids)))
        return Round(step_s, busiest)

    def _told(self, name: str, call: Callable[[], _Answer]) -> _Answer | None:
        """The worker's answer; None if it cannot go on, which is noted."""
        try:
            return call()
        except NotMeasuredError as error:
            self.absent[name] = str(error)
            del self._running[name]
            return None


def _warm_step_s(worker: Worker) -> float:
    """Seconds of a step; the first one also allocates and fills caches."""
    first_s = worker.start()
    return first_s if first_s > _LONG_STEP_S else worker.steps(1)[0]


def _used(rounds: Sequence[Round], plan: Plan) -> tuple[list[Round], bool]:
    quiet = [r for r in rounds if r.other_load <= plan.max_other_load]
    if len(quiet) >= MIN_ROUNDS:
        return quiet, True
    return sorted(rounds, key=lambda r: r.other_load)[:MIN_ROUNDS], len(quiet) == len(rounds)


def _objection(outcome: Outcome) -> str | None:
    """Why a variant gets no speed, if its results are not right."""
    if outcome.errors is None:
        return None
    name, error = worst(outcome.errors)
    if error <= outcome.allowed:
        return None
    return f"{name} is off by {error:.1e}, allowed {outcome.allowed:.0e}"
