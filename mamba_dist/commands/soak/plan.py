"""What happens in each round, by the seed alone: nothing here looks at a clock or a run."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

Launcher = Literal["python", "torchrun", "deepspeed"]
Event = Literal[
    "kill a rank",
    "kill all",
    "kill the launcher",
    "SIGTERM to the launcher",
    "SIGINT to the launcher",
    "SIGUSR1 to the launcher",
    "SIGTERM to a rank",
    "SIGINT to a rank",
    "SIGUSR1 to a rank",
    "stop a rank",
    "full disk, then room",
    "full disk, then kill all",
    "full disk, then SIGTERM",
]
Moment = Literal["start", "step", "save"]
DamageKind = Literal["flip a byte", "truncate", "delete"]

MOST_STEPS: Final = 9
"""A round strikes at this step of its launch at the latest."""

_EVENTS: Final[tuple[Event, ...]] = (
    "kill a rank",
    "kill a rank",
    "kill all",
    "kill all",
    "kill the launcher",
    "SIGTERM to the launcher",
    "SIGINT to the launcher",
    "SIGUSR1 to the launcher",
    "SIGTERM to a rank",
    "SIGINT to a rank",
    "SIGUSR1 to a rank",
    "stop a rank",
    "full disk, then room",
    "full disk, then kill all",
    "full disk, then SIGTERM",
)
_LAUNCHERS: Final[tuple[Launcher, ...]] = (
    *("torchrun",) * 4,
    *("deepspeed",) * 3,
    *("python",) * 3,
)
# Four ranks on two cores take twice as long to start as two.
_RANKS: Final = (*(2,) * 8, 1, 3, 4)
_ENGINES: Final = ("zero-0", "zero-1", "zero-2", "zero-3", "fsdp2", "fsdp2")
# Aimed at a save twice as often as elsewhere: that is where state can be lost.
_MOMENTS: Final[tuple[Moment, ...]] = (*("save",) * 4, *("step",) * 2, "start")
_DAMAGES: Final[tuple[DamageKind | None, ...]] = (
    "flip a byte",
    "flip a byte",
    "truncate",
    "delete",
    *(None,) * 5,
)
_ONE_IN_SO_MANY_ACCUMULATES: Final = 3
_ONE_IN_SO_MANY_IS_STARTED_TWICE: Final = 9
_ONE_IN_SO_MANY_FINDS_JUNK: Final = 4

_Card = TypeVar("_Card")


@dataclass(frozen=True)
class DamagePlan:
    """What befalls the newest checkpoint before a launch.

    `which` and `where` choose the file and the place in it, as shares of all.
    """

    kind: DamageKind
    which: float
    where: float


@dataclass(frozen=True)
class RoundPlan:
    """One launch and what is done to it.

    accumulates: a step is several micro-batches of each rank.
    after_steps: of this launch, when the event is due; with the moment "save" at the first save
        from then on.
    fraction: of the time that it takes to start, or of a step or a save, by which the event comes
        later.
    victim: which rank, as a share of all.
    """

    number: int
    launcher: Launcher
    ranks: int
    engine: str
    loaders: int
    accumulates: bool
    event: Event
    moment: Moment
    after_steps: int
    fraction: float
    victim: float
    started_twice: bool
    junk: bool
    damage: DamagePlan | None

    @property
    def strikes_launcher(self) -> bool:
        """Whether the event is for the launcher alone."""
        return self.event.endswith("the launcher")

    def __str__(self) -> str:
        when = {
            "start": f"{self.fraction:.0%} into its start",
            "step": f"after {self.after_steps} steps",
            "save": f"in a save after {self.after_steps} steps",
        }[self.moment]
        more = [
            *([f"before it {self.damage.kind}"] if self.damage else []),
            *(["junk"] if self.junk else []),
            *(["started twice"] if self.started_twice else []),
        ]
        return (
            f"{self.launcher} x{self.ranks} {self.engine}{' accumulating' * self.accumulates} "
            f"loaders {self.loaders}: {self.event} "
            f"{when}{''.join(f', {one}' for one in more)}"
        )


def schedule(seed: int) -> Iterator[RoundPlan]:
    """The rounds of a seed, without end; fewer rounds are the beginning of more.

    Each kind of thing is dealt from a shuffled deck, so that a run of twenty rounds has met nearly
    all of them.
    """
    events, launchers = _dealt(_EVENTS, seed, "events"), _dealt(_LAUNCHERS, seed, "launchers")
    ranks, engines = _dealt(_RANKS, seed, "ranks"), _dealt(_ENGINES, seed, "engines")
    moments, damages = _dealt(_MOMENTS, seed, "moments"), _dealt(_DAMAGES, seed, "damages")
    twice = _dealt(range(_ONE_IN_SO_MANY_IS_STARTED_TWICE), seed, "twice")
    junk = _dealt(range(_ONE_IN_SO_MANY_FINDS_JUNK), seed, "junk")
    accumulation = _dealt(range(_ONE_IN_SO_MANY_ACCUMULATES), seed, "accumulation")
    rng = random.Random(f"{seed} places")
    number = 0
    while True:
        number += 1
        event, launcher, moment = next(events), next(launchers), next(moments)
        if launcher == "python" and (event.endswith("the launcher") or event == "stop a rank"):
            # It has none; and a rank that is stopped alone on its host is woken by nobody.
            launcher = rng.choice(("torchrun", "deepspeed"))
        size = 1 if launcher == "python" else next(ranks)
        if event == "stop a rank":
            size = max(size, 2)
        if event == "stop a rank" or event.startswith("full disk"):
            # The watchdog sleeps until the first step has ended, and a disk is filled under a run
            # that saves.
            moment = "step"
        kind = next(damages)
        yield RoundPlan(
            number=number,
            launcher=launcher,
            ranks=size,
            engine=next(engines),
            loaders=int(rng.random() < 0.2),
            accumulates=next(accumulation) == 0,
            event=event,
            moment=moment,
            after_steps=rng.randint(2 if event == "stop a rank" else 1, MOST_STEPS),
            fraction=rng.random(),
            victim=rng.random(),
            started_twice=next(twice) == 0 and moment != "start",
            junk=next(junk) == 0,
            damage=None if kind is None else DamagePlan(kind, rng.random(), rng.random()),
        )


def _dealt(cards: Sequence[_Card], seed: int, name: str) -> Iterator[_Card]:
    rng = random.Random(f"{seed} {name}")
    while True:
        yield from rng.sample(list(cards), len(cards))
