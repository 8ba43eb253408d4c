"""The figures of `bench checkpoint` and their table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mamba_dist.commands.bench.measure import Spread

STEPS: Final = 20
"""Optimizer steps after a save whose time is looked at."""
_MB: Final = 1e-6


@dataclass(frozen=True)
class Turn:
    """One round: seconds and bytes over all ranks."""

    steps_s: float
    """STEPS steps without a save, the mean of those before and after the save in the background."""
    stall_s: float
    """What STEPS steps take longer, a save in the background at their beginning counted in."""
    stall_beside_s: float
    """The same until the save is committed, fewer steps or more, over the median step without it:
    of these two the one that a busy machine disturbs less."""
    waited_s: float
    """The part of the stall in which training stood still: until the save was begun, and before an
    update until the state was copied. The rest is what sharing cores and memory costs."""
    background_s: float
    """From the beginning of that save to the step that heard of its commit."""
    blocking_s: float
    dd_s: float
    load_s: float
    state_bytes: int
    file_bytes: int
    read_bytes: int


def table(turns: Sequence[Turn], *, ranks: int) -> str:
    """Title, table and what has to be said about it."""
    one = turns[0]

    def row(what: str, form: str, value: Callable[[Turn], float]) -> str:
        return f"| {what} | {Spread.of([value(turn) for turn in turns]).text(form)} |"

    return "\n".join(
        [
            f"### Checkpoints of {one.file_bytes * _MB:,.0f} MB, {ranks} ranks",
            "",
            "| | |",
            "|---|---|",
            row(f"{STEPS} steps, s", "{:.2f}", lambda t: t.steps_s),
            row("blocking save, s", "{:.3f}", lambda t: t.blocking_s),
            row(f"stall of {STEPS} steps by a background save, s", "{:.3f}", lambda t: t.stall_s),
            row("that, of the blocking save", "{:.1%}", lambda t: t.stall_s / t.blocking_s),
            row("of it, training stood still, s", "{:.3f}", lambda t: t.waited_s),
            row("that, of the blocking save", "{:.1%}", lambda t: t.waited_s / t.blocking_s),
            row("stall until it is committed, s", "{:.3f}", lambda t: t.stall_beside_s),
            row("that, of the blocking save", "{:.1%}", lambda t: t.stall_beside_s / t.blocking_s),
            row("background save, s", "{:.2f}", lambda t: t.background_s),
            row("blocking save, MB/s", "{:.0f}", lambda t: t.file_bytes * _MB / t.blocking_s),
            row("dd with fsync, MB/s", "{:.0f}", lambda t: t.file_bytes * _MB / t.dd_s),
            row("save over dd", "{:.2f}", lambda t: t.dd_s / t.blocking_s),
            row("load, s", "{:.3f}", lambda t: t.load_s),
            row("bytes read over bytes stored", "{:.4f}", lambda t: t.read_bytes / t.file_bytes),
            "",
            f"Medians of {len(turns)} rounds (smallest to largest), ratios within rounds.",
        ]
    )
