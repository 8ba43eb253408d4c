"""The tables and figures of `bench data-read`."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from mamba_dist.commands.bench.measure import Spread
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.commands.bench_read.spec import (
    ARROW,
    MEMMAP,
    OURS,
    WINDOW_TOKENS,
    ColdOpen,
    WarmTurns,
)
from mamba_dist.commands.machine import package_version, this_machine

PACKAGES: Final = ("numpy", "pyarrow", "datasets", "mosaicml-streaming", "litdata")
_NAMES: Final = {
    OURS: "ours",
    MEMMAP: "numpy.memmap",
    "megatron": "as Megatron-LM, index built at the start",
    ARROW: "pyarrow, every batch at the start",
    "datasets": "Hugging Face datasets",
    "streaming": "mosaicml-streaming",
    "litdata": "litdata",
}
_MB: Final = 1e-6
# Pages that were in use while the others were dropped.
_ALLOWED_CACHED: Final = 0.02


@dataclass(frozen=True)
class Sizes:
    """What a variant reads: number, length, and what they take on the disk, in bytes."""

    count: int
    bytes: int
    disk_bytes: int


@dataclass
class Runs:
    """All turns so far; those at one place in their lists belong to one round."""

    tokens: int
    windows: int
    files: Mapping[str, Sizes]
    absent: dict[str, str]
    starts_s: dict[str, list[float]] = field(default_factory=dict)
    cold: dict[str, list[ColdOpen]] = field(default_factory=dict)
    warm: dict[str, list[WarmTurns]] = field(default_factory=dict)

    def note(self, variant: str, step: Callable[[], object]) -> None:
        """Does a step of a variant's measurement, if it has not failed before."""
        if variant not in self.absent:
            try:
                step()
            except NotMeasuredError as error:
                self.absent[variant] = str(error)

    @property
    def wrong(self) -> dict[str, str]:
        """Variants whose windows hold other ids than the limit's, or the first one's."""
        first = self.warm.get(MEMMAP) or next(iter(self.warm.values()), None)
        found = {}
        for name, turns in self.warm.items():
            assert first is not None
            for turn in turns:
                differ = [a != b for a, b in zip(turn.sums, first[0].sums, strict=True)]
                if any(differ):
                    found[name] = f"{sum(differ)} of {len(differ)} windows hold other ids"
        return found

    @property
    def measured(self) -> list[str]:
        """Variants with figures, in order."""
        without = {*self.absent, *self.wrong}
        return [name for name in self.warm if name not in without]

    def of_cold(self, variant: str, value: Callable[[ColdOpen], float]) -> Spread:
        """A figure of the first opens."""
        return Spread.of([value(turn) for turn in self.cold[variant]])

    def of_warm(self, variant: str, value: Callable[[WarmTurns], Sequence[float]]) -> Spread:
        """A figure of the windows, over all turns."""
        return Spread.of([one for turns in self.warm[variant] for one in value(turns)])

    def ratio(self, variant: str, value: Callable[[WarmTurns], Sequence[float]]) -> Spread | None:
        """How many times the limit's, within turns."""
        if MEMMAP not in self.measured:
            return None
        pairs = [
            pair
            for one, other in zip(self.warm[variant], self.warm[MEMMAP], strict=True)
            for pair in zip(value(one), value(other), strict=True)
        ]
        return Spread.of([one / other for one, other in pairs])


def tables(found: Runs) -> str:
    """Both tables and what has to be said about them."""
    rounds = max((len(turns) for turns in found.warm.values()), default=0)
    notes = [f"Medians of {rounds} rounds (smallest to largest)."] if rounds else []
    notes += [
        f"{_NAMES[name]}: {files.count:,} files of {files.bytes * _MB:,.1f} MB, on the disk "
        f"{files.disk_bytes * _MB:,.1f} MB"
        for name, files in found.files.items()
    ]
    notes += [f"{_NAMES[name]}: {text}" for name in found.measured if (text := _kept(found, name))]
    notes += [f"{_NAMES[name]}: not measured: {why}" for name, why in found.absent.items()]
    notes += [f"{_NAMES[name]}: wrong: {why}" for name, why in found.wrong.items()]
    return "\n".join(
        [
            f"### Cold open, {found.tokens:,} tokens",
            "",
            *_table(found, _COLD),
            "",
            f"### Windows of {WINDOW_TOKENS:,} tokens of {found.windows:,}, from the page cache",
            "",
            *_table(found, _WARM),
            "",
            *notes,
        ]
    )


def document(words: Sequence[str], found: Runs) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "command": list(words),
        "date": str(datetime.date.today()),
        "machine": asdict(this_machine()),
        "versions": {name: package_version(name) for name in PACKAGES},
        "tokens": found.tokens,
        "records": [
            {
                "variant": name,
                "files": asdict(found.files[name]),
                "start_s": found.starts_s[name],
                "cold": [asdict(turn) for turn in found.cold[name]],
                "warm": [asdict(turn) for turn in found.warm[name]],
            }
            for name in found.measured
        ],
        "absent": found.absent,
        "wrong": found.wrong,
    }


_Column = tuple[str, Callable[[Runs, str], str]]


def _cold_column(title: str, value: Callable[[ColdOpen], float], text: str) -> _Column:
    return title, lambda found, name: found.of_cold(name, value).text(text)


def _warm_column(title: str, value: Callable[[WarmTurns], Sequence[float]], text: str) -> _Column:
    return title, lambda found, name: found.of_warm(name, value).text(text)


def _ratio_column(value: Callable[[WarmTurns], Sequence[float]]) -> _Column:
    def cell(found: Runs, name: str) -> str:
        ratio = found.ratio(name, value)
        return "" if ratio is None or name == MEMMAP else ratio.text("{:.2f}x")

    return "over memmap", cell


def _in_cache(found: Runs, name: str) -> str:
    turns = [turn for turn in found.cold[name] if turn.cached_bytes is not None]
    if not turns:
        return ""
    spread = Spread.of([(turn.cached_bytes or 0) * _MB for turn in turns])
    share = spread.median / _MB / found.files[name].bytes
    return f"{spread.median:,.2f} ({share:.1%})"


_COLD: Final[Sequence[_Column]] = (
    _cold_column("open, ms", lambda turn: 1e3 * turn.open_s, "{:,.1f}"),
    _cold_column("and the first window, ms", lambda turn: 1e3 * turn.first_s, "{:,.1f}"),
    _cold_column("fetched from the disk, MB", lambda turn: _MB * turn.storage_bytes, "{:,.2f}"),
    _cold_column("by read calls, MB", lambda turn: _MB * turn.call_bytes, "{:,.2f}"),
    ("of the files in the page cache then, MB", _in_cache),
    ("Python with its import, s", lambda found, v: Spread.of(found.starts_s[v]).text("{:.2f}")),
)
_WARM: Final[Sequence[_Column]] = (
    _warm_column("random, per CPU-s", lambda turns: turns.random_per_s, "{:,.0f}"),
    _ratio_column(lambda turns: turns.random_per_s),
    _warm_column("in order, per CPU-s", lambda turns: turns.in_order_per_s, "{:,.0f}"),
    _ratio_column(lambda turns: turns.in_order_per_s),
    _warm_column("private memory, MB", lambda turns: [_MB * turns.private_bytes], "{:,.1f}"),
)


def _table(found: Runs, columns: Sequence[_Column]) -> list[str]:
    heads = ["", *(title for title, _ in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in found.measured:
        cells = [_NAMES[name], *(cell(found, name) for _, cell in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _kept(found: Runs, name: str) -> str:
    """What spoils a cold open: files that did not leave the page cache."""
    before = max(turn.cached_before_bytes or 0 for turn in found.cold[name])
    share = before / max(found.files[name].bytes, 1)
    return (
        f"not cold: {share:.0%} of it stayed in the page cache" if share > _ALLOWED_CACHED else ""
    )
