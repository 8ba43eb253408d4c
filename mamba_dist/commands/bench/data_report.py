"""The table and the figures of `bench data`."""

import datetime
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from mamba_dist.commands.bench.data_worker import HF_MAP, MEGATRON, RAW
from mamba_dist.commands.bench.measure import Spread
from mamba_dist.commands.machine import package_version, this_machine
from mamba_dist.data.preparation.fast_backends import REFERENCE

_PACKAGES: Final = ("tokenizers", "fastokens", "orjson", "datasets", "transformers", "pyarrow")
_PEERS: Final = {
    HF_MAP: "Hugging Face `datasets.map`",
    MEGATRON: "a loop as Megatron's preprocess_data",
}


@dataclass(frozen=True)
class Turn:
    """One run of a variant; `tokens` without EOS."""

    cpu_s: float
    wall_s: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.cpu_s:.2f} CPU-seconds, {self.wall_s:.1f} s"


@dataclass
class Runs:
    """All turns so far: `texts` are bytes and documents by variant, for all that were asked for.

    Turns of one place in their lists belong to one round.
    """

    texts: Mapping[str, tuple[int, int]]
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, variant: str, turn: Turn | str) -> None:
        """Notes a turn, or why there is none."""
        if isinstance(turn, str):
            self.absent[variant] = turn
            self.turns.pop(variant, None)
        else:
            self.turns.setdefault(variant, []).append(turn)

    @property
    def wrong(self) -> dict[str, str]:
        """Variants that gave another number of ids than the first one with the same text."""
        first: dict[tuple[int, int], int] = {}
        found = {}
        for name, turns in self.turns.items():
            expected = first.setdefault(self.texts[name], turns[0].tokens)
            if (other := next((t.tokens for t in turns if t.tokens != expected), None)) is not None:
                found[name] = f"{other:,} ids instead of {expected:,}"
        return found

    def speed(self, variant: str) -> Spread:
        """MB of text per CPU-second."""
        return Spread.of(self._speeds(variant))

    def ratio(self, variant: str, other: str) -> Spread:
        """How many times faster than `other`, within rounds."""
        pairs = zip(self._speeds(variant), self._speeds(other), strict=True)
        return Spread.of([one / two for one, two in pairs])

    def _speeds(self, variant: str) -> list[float]:
        return [self.texts[variant][0] / 1e6 / turn.cpu_s for turn in self.turns[variant]]


def heading(words: Sequence[str], packages: Sequence[str] = _PACKAGES) -> str:
    """Machine, versions of the packages that are there, and the command."""
    found = {name: package_version(name) for name in packages}
    versions = ", ".join(f"{n} {v}" for n, v in found.items() if v is not None)
    return (
        f"Machine: {this_machine()}; {versions}; {datetime.date.today()}.\n"
        f"Command: `tools/bench.py {shlex.join(words)}`\n"
    )


def table(found: Runs) -> str:
    """Title, table and what has to be said about it."""
    heads = ("", "MB", "documents", "MB per CPU-second", "over its library alone")
    peers = [name for name in _PEERS if name in found.turns]
    lines = [
        "### Tokenising, JSON lines to shards",
        "",
        "| " + " | ".join((*heads, *(f"over {name}" for name in peers))) + " |",
        "|" + "---|" * (len(heads) + len(peers)),
    ]
    for name in found.turns:
        size, documents = found.texts[name]
        cells = [description(name), f"{size / 1e6:.1f}", f"{documents:,}"]
        cells.append(found.speed(name).text("{:.2f}"))
        alone = RAW + name
        cells.append(found.ratio(name, alone).text("{:.0%}") if alone in found.turns else "")
        cells += [found.ratio(name, peer).text("{:.1f}x") if peer != name else "" for peer in peers]
        lines.append("| " + " | ".join(cells) + " |")
    rounds = max((len(turns) for turns in found.turns.values()), default=0)
    notes = [f"Medians of {rounds} rounds (smallest to largest)."] if rounds else []
    notes += [f"{description(n)}: not measured: {why}" for n, why in found.absent.items()]
    notes += [f"{description(n)}: wrong: {why}" for n, why in found.wrong.items()]
    return "\n".join([*lines, "", *notes])


def document(words: Sequence[str], found: Runs) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "command": list(words),
        "date": str(datetime.date.today()),
        "machine": asdict(this_machine()),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "records": [
            {
                "variant": name,
                "text_bytes": found.texts[name][0],
                "documents": found.texts[name][1],
                "mb_per_cpu_s": asdict(found.speed(name)),
                "turns": [asdict(turn) for turn in turns],
            }
            for name, turns in found.turns.items()
        ],
        "absent": found.absent,
        "wrong": found.wrong,
    }


def description(variant: str) -> str:
    """What a variant is called in the table."""
    if variant in _PEERS:
        return _PEERS[variant]
    backend = "tokenizers" if variant.removeprefix(RAW) == REFERENCE else variant.removeprefix(RAW)
    return f"{backend} alone" if variant.startswith(RAW) else f"ours, {backend}, end to end"
