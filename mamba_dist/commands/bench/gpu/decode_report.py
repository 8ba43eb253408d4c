"""Markdown tables and JSON records of bench gpu-decode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mamba_dist.commands.bench.gpu.decode_models import PEER, Models, Shape
from mamba_dist.commands.bench.measure import Spread


@dataclass(frozen=True)
class Decoded:
    """The variants of one shape; it is filled while they are measured.

    asked: all variants. rounds: seconds per token, each with one turn of every variant that could
    run. absent, wrong: variants without figures and why. agreement: how many tokens a text has
    before the first one that differs from the first variant's; equal weights and other roundings
    part sooner or later.
    """

    shape: Shape
    asked: Sequence[str]
    rounds: list[Mapping[str, float]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, int] = field(default_factory=dict)

    @property
    def shown(self) -> list[str]:
        """Variants with figures."""
        without = {*self.absent, *self.wrong}
        return [v for v in self.asked if v not in without and any(v in r for r in self.rounds)]

    @property
    def is_right(self) -> bool:
        """Whether every variant has figures."""
        return self.shown == list(self.asked)

    def seconds(self, variant: str) -> Spread:
        """Per token of all texts."""
        return Spread.of([turns[variant] for turns in self.rounds if variant in turns])

    def speed_over_peer(self, variant: str) -> Spread | None:
        """How many times as fast as mamba-ssm, within rounds; None if that has no figures."""
        if PEER not in self.shown:
            return None
        both = [turns for turns in self.rounds if PEER in turns and variant in turns]
        return Spread.of([turns[PEER] / turns[variant] for turns in both]) if both else None


def records(found: Decoded, models: Models, copy: float) -> list[dict[str, Any]]:
    """The table's figures, one record per variant. copy: bytes per second."""
    bound_s = models.weight_bytes / copy
    all_of_them: list[dict[str, Any]] = []
    for variant in found.asked:
        record = vars(found.shape) | {
            "variant": variant,
            "common_tokens": found.agreement.get(variant),
        }
        if variant in found.shown:
            token_s, over = found.seconds(variant), found.speed_over_peer(variant)
            record |= {
                "seconds_per_token": vars(token_s),
                "tokens_per_s": found.shape.batch / token_s.median,
                "share_of_bound": bound_s / token_s.median,
                "speed_over_peer": vars(over) if over else None,
            }
        else:
            record |= {"absent": _absence(found, variant), "wrong": found.wrong.get(variant)}
        all_of_them.append(record)
    return all_of_them


def table(found: Decoded, models: Models, copy: float) -> str:
    """Title, times, ratios and what has to be said about them. copy: bytes per second."""
    heads = ["variant", "ms per token", "tokens/s", f"times as fast as {PEER}", "% of bound"]
    rows = [heads, ["---"] * len(heads)]
    bound_s = models.weight_bytes / copy
    for variant in found.shown:
        token_s, over = found.seconds(variant), found.speed_over_peer(variant)
        rows.append(
            [
                variant,
                _text(token_s.scaled(1e3), "{:.4g}"),
                f"{found.shape.batch / token_s.median:,.0f}",
                _text(over, "{:.2f}") if over else "",
                f"{100 * bound_s / token_s.median:.1f}",
            ]
        )
    lines = ["| " + " | ".join(cells) + " |" for cells in rows] if found.shown else []
    notes = _notes(found, models, bound_s)
    return "\n".join([f"### {found.shape}", "", *lines, "", *(f"- {n}" for n in notes), ""])


def _notes(found: Decoded, models: Models, bound_s: float) -> list[str]:
    common = ", ".join(f"{variant} {count}" for variant, count in found.agreement.items())
    without = {v: why for v in found.asked if (why := _absence(found, v)) is not None}
    states_mb = found.shape.batch * models.text_state_bytes / 1e6
    return [
        f"Medians (smallest to largest) of {len(found.rounds)} rounds; eager and graph are ours, "
        f"ops backend {models.backend}.",
        f"Bound: {models.weight_bytes / 1e6:.4g} MB of weights read at the speed of a copy, "
        f"{bound_s * 1e3:.3g} ms; our states of {found.shape.batch} texts, "
        f"{states_mb:.3g} MB, are read and written besides.",
        f"Tokens of {found.shape.new_tokens} before the first that differs: {common or 'none'}.",
        *(f"**{name}: not measured**: {why}" for name, why in without.items()),
        *(f"**{name}: wrong, so it has no speed**: {why}" for name, why in found.wrong.items()),
    ]


def _absence(found: Decoded, variant: str) -> str | None:
    if variant in found.shown or variant in found.wrong:
        return None
    return found.absent.get(variant, "it did not come to its turn")


def _text(spread: Spread, form: str) -> str:
    middle, low, high = (form.format(v) for v in (spread.median, spread.low, spread.high))
    return f"{middle} ({low}–{high})"
