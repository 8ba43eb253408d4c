"""Markdown tables of what was measured, with every figure beside its spread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mamba_dist.commands.bench.measure import Result, Spread
from mamba_dist.commands.bench.spec import Group, Row

_MIB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """A group's measurement, and which of its variants the others are compared with.

    baseline, limit: as in Group, None if they could not be measured.
    """

    group: Group
    result: Result
    baseline: Row | None
    limit: str | None

    @property
    def is_empty(self) -> bool:
        """Whether not one variant could be measured."""
        return not any(self.result.measured(row.name) for row in self.group.rows)


def figures(group: Group, result: Result) -> Figures:
    """The figures of a measured group."""
    measured = {row.name: row for row in group.rows if result.measured(row.name)}
    baseline = next((measured[name] for name in group.baselines if name in measured), None)
    return Figures(group, result, baseline, group.limit if group.limit in measured else None)


def table(found: Figures) -> str:
    """Title, table and what has to be said about it."""
    columns, group = _columns(found), found.group
    lines = [
        f"### {group.title}",
        "",
        "| " + " | ".join(head for head, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    shown = [row for row in group.rows if found.result.measured(row.name)]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in shown]
    return "\n".join([*lines, "", *_notes(found)])


def records(found: Figures) -> list[dict[str, Any]]:
    """The table's figures in seconds, bytes and ratios, one record per variant."""
    result = found.result
    rows: list[dict[str, Any]] = []
    for row in found.group.rows:
        record: dict[str, Any] = {"group": found.group.title, "variant": row.name}
        if not result.measured(row.name):
            rows.append(record | _without_figures(result, row.name))
            continue
        outcome = result.outcomes[row.name]
        record |= {
            "step_s": vars(result.step_s(row.name)),
            "tokens_per_step": row.tokens,
            "peak_bytes": outcome.peak_bytes,
            "errors": outcome.errors,
            "rounds": len(result.rounds),
            "dropped_rounds": result.dropped,
            "quiet": result.quiet,
        }
        if found.baseline:
            record["baseline"] = found.baseline.name
            record["time_per_token_over_baseline"] = vars(_over(found, row, found.baseline))
        if found.limit:
            record["share_of_limit"] = vars(result.ratio(found.limit, row.name))
            record["peak_over_limit"] = _peak_over_limit(found, row.name, found.limit)
        rows.append(record)
    return rows


def _without_figures(result: Result, name: str) -> dict[str, str]:
    if name in result.wrong:
        return {"wrong": result.wrong[name]}
    return {"absent": result.absent[name]}


def _over(found: Figures, row: Row, baseline: Row) -> Spread:
    """Time per token of a row over the baseline's."""
    return found.result.ratio(row.name, baseline.name).scaled(baseline.tokens / row.tokens)


def _peak_over_limit(found: Figures, name: str, limit: str) -> float:
    outcomes = found.result.outcomes
    return outcomes[name].peak_bytes / max(1, outcomes[limit].peak_bytes)


def _columns(found: Figures) -> list[tuple[str, Callable[[Row], str]]]:
    result, baseline, limit = found.result, found.baseline, found.limit
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("variant", lambda row: row.description),
        ("ms per step", lambda row: _text(result.step_s(row.name).scaled(1e3), "{:.4g}")),
        ("tokens/s", lambda row: f"{row.tokens / result.step_s(row.name).median:,.0f}"),
    ]
    if baseline is not None:
        columns.append(
            (
                f"time per token over {baseline.description}",
                lambda row: _text(_over(found, row, baseline), "{:.2f}x"),
            )
        )
    if limit is not None:
        columns.append(
            (
                "share of the limit's speed",
                lambda row: _text(result.ratio(limit, row.name).scaled(100), "{:.1f} %"),
            )
        )
    columns.append(("peak MiB", lambda row: f"{result.outcomes[row.name].peak_bytes / _MIB:,.0f}"))
    if limit is not None:
        columns.append(
            ("over the limit's", lambda row: f"{_peak_over_limit(found, row.name, limit):.2f}x")
        )
    return columns


def _notes(found: Figures) -> list[str]:
    result, group = found.result, found.group
    rounds = {row.name: sum(row.name in r.step_s for r in result.rounds) for row in group.rows}
    counted = max(rounds.values(), default=0)
    notes = [
        f"Medians (smallest to largest) of {counted} rounds, ratios within rounds; "
        f"{result.dropped} rounds dropped because other processes were busy."
    ]
    if found.limit is not None:
        notes.append(
            "The limit's stand-ins read and write what the ops do, in single elementwise passes."
        )
    notes += [
        f"{row.description}: {rounds[row.name]} rounds."
        for row in group.rows
        if 0 < rounds[row.name] < counted
    ]
    if not result.quiet:
        busiest = max(r.other_load for r in result.rounds)
        notes.append(
            f"**The machine was not quiet**: other processes took up to {busiest:.2f} cores during "
            "these rounds. Do not publish them."
        )
    notes += [
        f"{row.description}: not measured: {result.absent[row.name]}"
        for row in group.rows
        if row.name in result.absent
    ]
    notes += [
        f"**{row.description}: wrong, so it has no speed**: {result.wrong[row.name]}"
        for row in group.rows
        if row.name in result.wrong
    ]
    return [*(f"- {note}" for note in notes), ""]


def _text(spread: Spread, form: str) -> str:
    middle, low, high = (form.format(v) for v in (spread.median, spread.low, spread.high))
    return f"{middle} ({low}–{high})"
