"""One line for each round, and what they come to."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba_dist.commands.soak.comparison import Comparison
from mamba_dist.commands.soak.disturbance import ENDED_BEFORE
from mamba_dist.commands.soak.rounds import RoundResult


@dataclass(frozen=True)
class Summary:
    """`held`: nothing was wrong."""

    held: bool
    text: str
    record: dict[str, Any]


def round_line(result: RoundResult, *, rounds: int) -> str:
    """What was done in a round and what came of it; its faults follow, one a line."""
    missed = f" NOT DONE ({result.missed})" if result.missed else ""
    came = "-" if result.resumed is None else f"{result.resumed} to {result.last_step or '-'}"
    parts = [
        f"[{result.plan.number:3}/{rounds}] {result.plan}{missed}",
        *([result.before] if result.before else []),
        f"exit {result.code}",
        f"steps {came}",
        f"whole {' '.join(map(str, result.whole)) or '-'}",
        *([f"passed over {' '.join(map(str, result.passed_over))}"] * bool(result.passed_over)),
        f"{result.seconds:.1f} s",
    ]
    return "\n".join([" | ".join(parts), *(f"    FAULT: {one}" for one in result.faults)])


def summary(
    results: Sequence[RoundResult],
    comparison: Comparison,
    faults: Sequence[str],
    *,
    weights: float,
    tolerances: tuple[float, float],
    seconds: float,
) -> Summary:
    """All of it; `faults` are those of the end, the rounds have their own."""
    done = Counter(one.plan.event for one in results if one.missed is None)
    missed = Counter(one.plan.event for one in results if one.missed is not None)
    wrong = sum(bool(one.faults) for one in results)
    record: dict[str, Any] = {
        "events": dict(done),
        "events_not_done": dict(missed),
        "resumes": sum(bool(one.resumed) for one in results) + 1,
        "passed_over": sum(len(one.passed_over) for one in results),
        "second_starts_refused": sum(one.plan.started_twice for one in results),
        "steps": comparison.steps,
        "steps_trained_again": comparison.trained_again,
        "rows": comparison.rows,
        "largest_loss_difference": comparison.largest_loss_difference,
        "largest_metrics_difference": comparison.largest_metrics_difference,
        "validations": comparison.validations,
        "largest_validation_difference": comparison.largest_validation_difference,
        "weights_relative_l2": weights,
        "rounds_with_faults": wrong,
        "faults": list(faults),
        "seconds": round(seconds, 1),
    }
    # A disk that cannot be had is said; a run that ends before its events is too short for them.
    too_short = any(one.missed == ENDED_BEFORE for one in results)
    held = not faults and not wrong and not too_short
    kinds = "".join(f"\n             {count:3} {event}" for event, count in sorted(done.items()))
    kinds += "".join(
        f"\n             {count:3} {event} NOT DONE" for event, count in sorted(missed.items())
    )
    text = "\n".join(
        [
            f"rounds     {len(results)} in {seconds:.0f} s, {wrong} with faults",
            f"events     {sum(done.values())} of {len(results)} done{kinds}",
            f"resumes    {record['resumes']}, {record['passed_over']} damaged checkpoints passed "
            f"over, {record['second_starts_refused']} second starts refused",
            f"samples    {comparison.steps} steps, {comparison.trained_again} of them trained more "
            f"than once, {comparison.rows:,} rows",
            _losses_line(comparison, allowed=tolerances[0]),
            f"weights    {weights:.2g} away, relative L2 (allowed {tolerances[1]:g})",
            *(f"FAULT      {one}" for one in faults),
            *["FAULT      the run ended before its events"] * too_short,
            f"verdict    {'all held' if held else 'FAILED'}",
        ]
    )
    return Summary(held, text, record)


def _losses_line(comparison: Comparison, *, allowed: float) -> str:
    return (
        f"losses     at most {comparison.largest_loss_difference:.2g} nats away (allowed "
        f"{allowed:g}), {comparison.largest_metrics_difference:.2g} in metrics.jsonl, "
        f"{comparison.largest_validation_difference:.2g} in {comparison.validations} validations"
    )
