"""Markdown tables and JSON records of bench gpu-ops."""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import torch

from mamba_dist.commands.bench.cases import Case
from mamba_dist.commands.bench.gpu.arguments import command_lines
from mamba_dist.commands.bench.gpu.precision import Precision, Row
from mamba_dist.commands.bench.measure import Spread
from mamba_dist.commands.bench.spec import dtype_name
from mamba_dist.commands.machine import package_version, this_machine

Pass = Literal["forward", "backward", "both"]
PASSES: Final[tuple[Pass, ...]] = ("forward", "backward", "both")
_TITLES: Final[Mapping[Pass, str]] = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward and backward",
}
# Repetitions of the same work on a device that has nothing else to do lie closer together.
_STEADY: Final = 1.2
_PACKAGES: Final = ("torch", "triton", "mamba-ssm", "causal-conv1d")


@dataclass(frozen=True)
class Steps:
    """Seconds of one row in one round.

    forward: without a graph. backward: after a forward that keeps one. both: that pair.
    """

    forward: float
    backward: float
    both: float


@dataclass(frozen=True)
class Measured:
    """The rows of one case.

    rounds: each with one step of every row that could run. absent, wrong: rows without figures and
    why. least_bytes: of forward and backward. warm_s: building, compiling and tuning.
    differences: how far a row is from a peer at these very sizes, in words. suspects: those rows
    whose difference is too large for rounding.
    """

    case: Case
    rows: Sequence[Row]
    rounds: Sequence[Mapping[Row, Steps]] = ()
    absent: Mapping[Row, str] = field(default_factory=dict)
    wrong: Mapping[Row, str] = field(default_factory=dict)
    least_bytes: Mapping[Row, tuple[int, int]] = field(default_factory=dict)
    warm_s: Mapping[Row, float] = field(default_factory=dict)
    differences: Mapping[Row, str] = field(default_factory=dict)
    suspects: frozenset[Row] = frozenset()

    @property
    def shown(self) -> list[Row]:
        """Rows with figures."""
        without = {*self.absent, *self.wrong}
        return [r for r in self.rows if r not in without and any(r in x for x in self.rounds)]

    @property
    def is_right(self) -> bool:
        """Whether every row has figures that can be believed."""
        return len(self.shown) == len(self.rows) and not self.suspects

    @property
    def fastest_peer(self) -> Row | None:
        """The peer with the shortest forward and backward, which ours has to beat."""
        peers = [row for row in self.shown if not row.is_ours]
        return min(peers, key=lambda row: self.seconds(row, "both").median, default=None)

    def seconds(self, row: Row, which: Pass) -> Spread:
        """Of one step."""
        return Spread.of([getattr(steps[row], which) for steps in self.rounds if row in steps])

    def unsteady(self, row: Row) -> dict[Pass, float]:
        """Passes whose median is far above their smallest time, and how many times it is that."""
        spreads = {which: self.seconds(row, which) for which in PASSES}
        return {p: s.median / s.low for p, s in spreads.items() if s.median > _STEADY * s.low}

    def speed_over(self, row: Row, peer: Row, which: Pass) -> Spread:
        """How many times as fast the row is as the peer, within rounds."""
        return Spread.of(
            [
                getattr(steps[peer], which) / getattr(steps[row], which)
                for steps in self.rounds
                if row in steps and peer in steps
            ]
        )

    def share_of_copy(self, row: Row, which: Pass, copy_bytes_per_s: float) -> float:
        """The speed at which the least bytes are moved, over that of a copy."""
        forward, backward = self.least_bytes[row]
        moved = {"forward": forward, "backward": backward, "both": forward + backward}[which]
        return moved / self.seconds(row, which).median / copy_bytes_per_s


def heading(
    words: Sequence[str], in_full: Sequence[str], device: torch.device, copy_bytes_per_s: float
) -> str:
    """What the figures were measured on, and by which command, as given and with all options."""
    versions = ", ".join(f"{n} {v}" for n, v in _versions().items() if v is not None)
    return (
        f"Device: {device_name(device)}, copy {copy_bytes_per_s / 1e12:.3g} TB/s; {versions}; "
        f"{this_machine()}; {datetime.date.today()}.\n"
        f"{command_lines(words, in_full)}"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return this_machine().processor


def table(found: Measured, copy_bytes_per_s: float) -> str:
    """Title, times, ratios and what has to be said about them."""
    columns = _columns(found, copy_bytes_per_s)
    lines = [f"### {found.case}, {dtype_name(found.case.dtype)}", ""]
    if found.shown:
        lines += _markdown(
            [head for head, _ in columns],
            [[cell(row) for _, cell in columns] for row in found.shown],
        )
    return "\n".join([*lines, "", *_notes(found), ""])


def precision_table(found: Precision) -> str:
    """Every tensor's error by row, and ours over the peer's."""
    peer = next((row for row in found.l2 if not row.is_ours), None)
    compared = [row for row in found.l2 if peer and row.is_ours and not row.documents]
    title = f"#### Errors ||x - truth|| / ||truth|| at {found.case}, {dtype_name(found.case.dtype)}"
    heads = [f"{row} and state" if row.documents else str(row) for row in found.l2]
    lines = []
    for tensor in dict.fromkeys(name for errors in found.l2.values() for name in errors):
        cells = [
            f"{errors[tensor]:.2e}" if tensor in errors else "" for errors in found.l2.values()
        ]
        ratios = [_error_ratio(found, row, peer, tensor) for row in compared if peer]
        lines.append([tensor, *cells, *ratios])
    table = _markdown(["", *heads, *(f"{row} / {peer}" for row in compared)], lines)
    notes = [f"- **{row}: wrong or failed**: {why}" for row, why in found.objections.items()]
    return "\n".join([title, "", *(table if found.l2 else []), "", *notes, ""])


def document(
    words: Sequence[str],
    in_full: Sequence[str],
    device: torch.device,
    copy_bytes_per_s: float,
    measured: Iterable[Measured],
    precisions: Iterable[Precision],
) -> dict[str, Any]:
    """Everything that the tables say, in seconds, bytes and ratios."""
    return {
        "command": list(words),
        "command_in_full": list(in_full),
        "date": str(datetime.date.today()),
        "machine": asdict(this_machine()),
        "device": device_name(device),
        "versions": _versions(),
        "copy_bytes_per_s": copy_bytes_per_s,
        "records": [r for found in measured for r in records(found, copy_bytes_per_s)],
        "precision": [
            {
                "case": str(found.case),
                "dtype": dtype_name(found.case.dtype),
                "l2": {str(row): errors for row, errors in found.l2.items()},
                "objections": {str(row): why for row, why in found.objections.items()},
            }
            for found in precisions
        ],
    }


def records(found: Measured, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    """The table's figures, one record per row."""
    peer = found.fastest_peer
    all_of_them: list[dict[str, Any]] = []
    for row in found.rows:
        record: dict[str, Any] = {
            "case": str(found.case),
            "dtype": dtype_name(found.case.dtype),
            "variant": str(row),
            "difference": found.differences.get(row),
        }
        if row in found.shown:
            record |= {
                "rounds": sum(row in steps for steps in found.rounds),
                "warm_s": found.warm_s[row],
                "unsteady": found.unsteady(row),
                "least_bytes": found.least_bytes[row],
                "seconds": {p: vars(found.seconds(row, p)) for p in PASSES},
                "share_of_copy": {p: found.share_of_copy(row, p, copy_bytes_per_s) for p in PASSES},
                "fastest_peer": str(peer) if peer else None,
                "speed_over_peer": {p: vars(found.speed_over(row, peer, p)) for p in PASSES}
                if peer
                else None,
            }
        else:
            record |= {"wrong": found.wrong.get(row), "absent": found.absent.get(row)}
        all_of_them.append(record)
    return all_of_them


def _columns(found: Measured, copy_bytes_per_s: float) -> list[tuple[str, Callable[[Row], str]]]:
    columns: list[tuple[str, Callable[[Row], str]]] = [("variant", str)]
    peer = found.fastest_peer
    for which in PASSES:
        columns.append((f"{_TITLES[which]} ms", _time_cell(found, which)))
    for which in PASSES if peer else ():
        columns.append((f"{_TITLES[which]}, times as fast as {peer}", _ratio_cell(found, which)))
    for which in PASSES:
        columns.append(
            (f"{_TITLES[which]}, % of copy", _share_cell(found, which, copy_bytes_per_s))
        )
    return columns


def _time_cell(found: Measured, which: Pass) -> Callable[[Row], str]:
    return lambda row: _text(found.seconds(row, which).scaled(1e3), "{:.4g}")


def _ratio_cell(found: Measured, which: Pass) -> Callable[[Row], str]:
    peer = found.fastest_peer
    return lambda row: _text(found.speed_over(row, peer, which), "{:.2f}") if peer else ""


def _share_cell(found: Measured, which: Pass, copy: float) -> Callable[[Row], str]:
    return lambda row: f"{100 * found.share_of_copy(row, which, copy):.1f}"


def _notes(found: Measured) -> list[str]:
    warm = ", ".join(f"{row} {seconds:.1f} s" for row, seconds in found.warm_s.items())
    notes = [
        f"Medians (smallest to largest) of {len(found.rounds)} rounds.",
        f"To build, compile and warm up it took: {warm or 'nothing, as no row got so far'}.",
    ]
    for row, text in found.differences.items():
        mark = "**too much for rounding**: " if row in found.suspects else ""
        notes.append(f"{row}: {mark}{text}")
    notes += [
        f"**{row}: unsteady**, {_TITLES[which]}: the median is {times:.2f} times the smallest; the "
        "device had other work, or the host could not launch in time"
        for row in found.shown
        for which, times in found.unsteady(row).items()
    ]
    notes += [f"**{row}: not measured**: {why}" for row, why in found.absent.items()]
    notes += [f"**{row}: wrong, so it has no speed**: {why}" for row, why in found.wrong.items()]
    return [f"- {note}" for note in notes]


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _error_ratio(found: Precision, ours: Row, peer: Row, tensor: str) -> str:
    error, theirs = found.l2[ours].get(tensor), found.l2[peer].get(tensor)
    # An exact peer leaves no ratio.
    return f"{error / theirs:.2g}" if error is not None and theirs else ""


def _versions() -> dict[str, str | None]:
    return {name: package_version(name) for name in _PACKAGES}


def _text(spread: Spread, form: str) -> str:
    middle, low, high = (form.format(v) for v in (spread.median, spread.low, spread.high))
    return f"{middle} ({low}–{high})"
