"""The logs of all ranks as one, in order of time; what several ranks say alike stands there once.

Ranks that say the same within a minute are folded into one line with their numbers. Clocks of nodes
may differ, by which lines of different hosts can change places; those of one rank never do.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from mamba_dist.telemetry.log import END, LOGS, START

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ([A-Z]+) (.*)", re.DOTALL)
_FILE = re.compile(r"rank-(\d{5,})(\.old)?\.log")
_HOST = re.compile(r"rank \d+ of \d+, host ([^,]+), process \d+; ")
_ALIKE_WITHIN_S = 60.0
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Entry:
    """A line of one rank, with the ones that belong to it."""

    at: float
    kind: str
    """A level of Python's logging, or START or END."""
    text: str


@dataclass
class Told:
    """What one or more ranks said."""

    at: float
    kind: str
    text: str
    speakers: dict[int, str] = field(default_factory=dict)
    """Ranks and their hosts."""


def merged(run_dir: Path) -> list[Told]:
    """All lines of all ranks; memory is that of the lines that differ."""
    by_text: dict[tuple[str, str], list[Told]] = {}
    for rank, paths in _files(run_dir).items():
        host = ""
        for path in paths:
            for entry in entries(path):
                if entry.kind == START and (found := _HOST.match(entry.text)):
                    # Who it is, is told in front of the line.
                    host, entry = found[1], replace(entry, text=entry.text[found.end() :])
                _fold(by_text.setdefault((entry.kind, entry.text), []), entry, rank, host)
    return sorted((one for told in by_text.values() for one in told), key=lambda one: one.at)


def describe(told: Iterable[Told]) -> Iterator[str]:
    """Lines for people; ranks and hosts are named where there is more than one."""
    told = list(told)
    ranks = {rank for one in told for rank in one.speakers}
    hosts = {host for one in told for host in one.speakers.values()}
    for one in told:
        moment = datetime.fromtimestamp(one.at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        who = ""
        if len(ranks) > 1:
            own = set(one.speakers.values())
            where = f" {own.pop()}" if len(hosts) > 1 and len(own) == 1 else ""
            who = f"[{numbered('rank', one.speakers)}{where}] "
        kind = "" if one.kind == "INFO" else f"{one.kind} "
        yield f"{moment} {who}{kind}{one.text}"


def last_words(run_dir: Path, *, since: float) -> dict[int, Entry | None]:
    """How each rank's log ends a start, by its END line; None: it has none since then.

    Only the ends of the files are read.
    """
    found: dict[int, Entry | None] = {}
    for rank, paths in _files(run_dir).items():
        ends = [
            entry
            for entry in entries(paths[-1], tail=True)
            if entry.kind == END and entry.at >= since
        ]
        found[rank] = ends[-1] if ends else None
    return found


def last_sign_of_life(run_dir: Path) -> float | None:
    """When any log was last written to."""
    moments = [path.stat().st_mtime for paths in _files(run_dir).values() for path in paths]
    return max(moments, default=None)


def entries(path: Path, *, tail: bool = False) -> Iterator[Entry]:
    """The lines of one file; of `tail` the last ones."""
    head: re.Match[str] | None = None
    more: list[str] = []
    for line in _lines(path, tail=tail):
        if (match := _LINE.fullmatch(line)) is None:
            # Of the entry before; the stacks of a native crash are not indented.
            more.append(line)
            continue
        if head is not None:
            yield _entry(head, more)
        head, more = match, []
    if head is not None:
        yield _entry(head, more)


def numbered(noun: str, numbers: Iterable[int]) -> str:
    """Ranks 0-7, 9 of a set of numbers."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"{noun} {shown}" if shown.isdigit() else f"{noun}s {shown}"


def _fold(told: list[Told], entry: Entry, rank: int, host: str) -> None:
    first = bisect_left(told, entry.at - _ALIKE_WITHIN_S, key=lambda one: one.at)
    for one in told[first:]:
        if one.at > entry.at + _ALIKE_WITHIN_S:
            break
        if rank not in one.speakers:
            one.speakers[rank] = host
            return
    place = bisect_left(told, entry.at, key=lambda one: one.at)
    told.insert(place, Told(entry.at, entry.kind, entry.text, {rank: host}))


def _files(run_dir: Path) -> dict[int, list[Path]]:
    """The logs of each rank, the older one first."""
    found: dict[int, list[Path]] = {}
    folder = run_dir / LOGS
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []
    for name in names:
        if match := _FILE.fullmatch(name):
            found.setdefault(int(match[1]), []).append(folder / name)
    return dict(sorted(found.items()))


def _lines(path: Path, *, tail: bool) -> Iterator[str]:
    with path.open("rb") as file:
        if tail:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
        for line in file:
            yield line.decode(errors="replace").rstrip("\n")


def _entry(head: re.Match[str], more: list[str]) -> Entry:
    at = datetime.fromisoformat(head[1]).timestamp()
    return Entry(at, head[2], "\n".join([head[3], *more]))
