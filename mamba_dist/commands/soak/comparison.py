"""What each launch trained on, and whether it is what the undisturbed run trained on."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MOST_TOLD: Final = 5
"""So many faults of a kind are spelled out."""


@dataclass(frozen=True)
class TrainedStep:
    """One rank's part of a step: hashes of its rows in order, and the loss over all ranks."""

    step: int
    rows: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class RankTrace:
    """What one rank of a launch noted, step by step."""

    launch: str
    rank: int
    ranks: int
    steps: tuple[TrainedStep, ...]


@dataclass
class Comparison:
    """`faults` are empty if the runs are one."""

    faults: list[str] = field(default_factory=list)
    steps: int = 0
    trained_again: int = 0
    """Steps that more than one launch trained."""
    rows: int = 0
    largest_loss_difference: float = 0.0
    largest_metrics_difference: float = 0.0
    validations: int = 0
    largest_validation_difference: float = 0.0

    def extend(self, faults: Sequence[str]) -> None:
        """Adds faults of one kind, the first of them in full."""
        self.faults += faults[:MOST_TOLD]
        if len(faults) > MOST_TOLD:
            self.faults.append(f"… and {len(faults) - MOST_TOLD} more of this kind")


def read_traces(folder: Path, *, launch: str) -> list[RankTrace]:
    """What the ranks of a launch noted; a line cut short by a kill is left out."""
    traces = []
    for path in sorted(folder.glob("rank-*.jsonl")):
        _, rank, _, ranks = path.stem.split("-")
        lines = path.read_text().splitlines(keepends=True)
        said = [json.loads(line) for line in lines if line.endswith("\n")]
        steps = tuple(TrainedStep(s["step"], tuple(s["rows"]), s["loss"]) for s in said)
        traces.append(RankTrace(launch, int(rank), int(ranks), steps))
    return traces


def compare(
    reference: Mapping[int, TrainedStep],
    traces: Iterable[RankTrace],
    *,
    metrics: Mapping[int, float],
    total_steps: int,
    tolerance: float,
) -> Comparison:
    """All that ranks trained on and told, beside the one rank of the undisturbed run.

    Args:
        reference: its steps, whole.
        metrics: the loss of each step that metrics.jsonl gives last.
        tolerance: of losses, in nats per token.
    """
    traces, found = list(traces), Comparison()
    samples: list[str] = []
    losses: list[str] = []
    for trace in traces:
        for one in trace.steps:
            wanted = reference.get(one.step)
            where = f"{trace.launch}, rank {trace.rank} of {trace.ranks}, step {one.step}"
            if wanted is None:
                samples.append(f"{where}: the undisturbed run has no such step")
                continue
            share = len(wanted.rows) // trace.ranks
            own = wanted.rows[trace.rank * share : (trace.rank + 1) * share]
            if one.rows != own:
                samples.append(f"{where}: trained on {_rows(one.rows)}, expected {_rows(own)}")
            found.rows += len(one.rows)
            difference = _difference(one.loss, wanted.loss)
            found.largest_loss_difference = max(found.largest_loss_difference, difference)
            if difference > tolerance:
                losses.append(f"{where}: loss {one.loss:.7g}, expected {wanted.loss:.7g}")
    found.extend(samples)
    found.extend(losses)
    found.extend(_holes(traces))
    found.extend(_missing(reference, traces, total_steps, found))
    found.extend(_metrics_faults(reference, metrics, total_steps, tolerance, found))
    return found


def compare_validations(
    reference: Mapping[int, float],
    told: Mapping[int, float],
    *,
    tolerance: float,
    found: Comparison,
) -> None:
    """Adds to `found` what is wrong with the validation losses by step, in nats per token.

    A launch that is told to stop leaves out the validation that was due; some must be there.
    """
    faults = []
    for step, loss in told.items():
        if step not in reference:
            faults.append(f"step {step} was validated, the undisturbed run did not")
            continue
        found.validations += 1
        difference = _difference(loss, reference[step])
        found.largest_validation_difference = max(found.largest_validation_difference, difference)
        if difference > tolerance:
            faults.append(
                f"step {step}: validation loss {loss:.7g}, expected {reference[step]:.7g}"
            )
    if 2 * found.validations < len(reference):
        faults.append(f"{found.validations} of {len(reference)} validations were made")
    found.extend(faults)


def _holes(traces: Iterable[RankTrace]) -> list[str]:
    """Steps within a launch are one after the other."""
    faults = []
    for trace in traces:
        for before, after in zip(trace.steps, trace.steps[1:], strict=False):
            if after.step != before.step + 1:
                faults.append(
                    f"{trace.launch}, rank {trace.rank}: step {after.step} after {before.step}"
                )
    return faults


def _missing(
    reference: Mapping[int, TrainedStep],
    traces: Sequence[RankTrace],
    total_steps: int,
    found: Comparison,
) -> list[str]:
    """Each step was trained by all ranks of the last launch that came to it.

    That is the launch whose work the final weights hold: a later one that went on from after this
    step has not trained it, and one that was lost with it was followed by one that did again.
    """
    faults = []
    ranks: dict[int, dict[str, dict[int, int]]] = {}
    for trace in traces:
        for one in trace.steps:
            ranks.setdefault(one.step, {}).setdefault(trace.launch, {})[trace.rank] = trace.ranks
    for step in range(1, total_steps + 1):
        if step not in reference:
            faults.append(f"step {step}: the undisturbed run has not noted it")
        launches = ranks.get(step)
        if launches is None:
            faults.append(f"step {step}: no launch trained it")
            continue
        found.steps += 1
        found.trained_again += len(launches) > 1
        last = list(launches)[-1]
        size = next(iter(launches[last].values()))
        if len(launches[last]) != size:
            faults.append(
                f"step {step}: only ranks {sorted(launches[last])} of {size} trained it in "
                f"{last}, the last launch that came to it"
            )
    return faults


def _metrics_faults(
    reference: Mapping[int, TrainedStep],
    metrics: Mapping[int, float],
    total_steps: int,
    tolerance: float,
    found: Comparison,
) -> list[str]:
    faults = []
    for step in range(1, total_steps + 1):
        if step not in metrics:
            faults.append(f"metrics.jsonl has no loss of step {step}")
        elif step in reference:
            difference = _difference(metrics[step], reference[step].loss)
            found.largest_metrics_difference = max(found.largest_metrics_difference, difference)
            if difference > tolerance:
                faults.append(
                    f"metrics.jsonl gives step {step} a loss of {metrics[step]:.7g}, expected "
                    f"{reference[step].loss:.7g}"
                )
    return faults


def _difference(loss: float, wanted: float) -> float:
    difference = abs(loss - wanted)
    return math.inf if math.isnan(difference) else difference


def _rows(rows: Sequence[str]) -> str:
    shown = " ".join(row[:6] for row in rows[:3])
    return f"{len(rows)} rows {shown}{' …' if len(rows) > 3 else ''}"
