"""Markdown table and JSON records of bench gpu-train."""

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from mamba_dist.commands.bench.gpu.arguments import command_lines
from mamba_dist.commands.bench.gpu.profile import by_category
from mamba_dist.commands.bench.gpu.step import StepResult, StepSpec
from mamba_dist.commands.bench.measure import Spread
from mamba_dist.commands.machine import package_version, this_machine
from mamba_dist.model.flops import parameter_count

PEER: Final = "mamba-ssm"
# What the others are compared with: the first one that there is.
_BASELINES: Final = (PEER, "plain")
_DESCRIPTIONS: Final[Mapping[str, str]] = {
    PEER: "mamba-ssm's model, plain loop",
    "plain": "our model, plain loop",
}
_OF_SEVERAL_RANKS: Final = ("zero-1", "zero-2", "zero-3")
_PACKAGES: Final = ("torch", "triton", "mamba-ssm", "causal-conv1d", "deepspeed")
_GIB: Final = 1 << 30
# Dense bf16 of an H100 SXM, from NVIDIA's data sheet.
_PEAK_FLOPS_PER_S: Final[Mapping[str, float]] = {
    # The SXM boards; others of that name are slower.
    "H100 80GB HBM3": 989e12,
    "H200": 989e12,
}
# Steps whose losses are compared, and how far ours may lie apart. Later ones drift: the last bits
# differ, and a batch that is being learnt by heart makes more of them. The peer's kernels round
# elsewhere from the first step on.
_COMPARED: Final = 4
_ALLOWED: Final = {"bf16": 2e-3, "fp32": 1e-4}
_PEER_SLACK: Final = 10


@dataclass(frozen=True)
class Runs:
    """What was measured: for each round, each variant's result or why it has none."""

    specs: Mapping[str, StepSpec]
    rounds: Sequence[Mapping[str, StepResult | str]]

    def results(self, name: str) -> list[StepResult]:
        """A variant's results of all rounds."""
        found = [r[name] for r in self.rounds if name in r]
        return [result for result in found if isinstance(result, StepResult)]

    def seconds(self, name: str) -> Spread:
        """Of one step, over all rounds."""
        steps = [s for result in self.results(name) for s in result.step_s]
        return Spread.of(steps)

    def speed_over(self, name: str, other: str) -> Spread:
        """Tokens per second over another variant's, within rounds."""
        pairs = [(r.get(name), r.get(other)) for r in self.rounds]
        return Spread.of(
            [
                statistics.median(b.step_s) / statistics.median(a.step_s)
                for a, b in pairs
                if isinstance(a, StepResult) and isinstance(b, StepResult)
            ]
        )

    @property
    def matmul_limits(self) -> list[float]:
        """FLOP/s of large products, each measured just before a variant."""
        results = [result for name in self.specs for result in self.results(name)]
        return [r.matmul_flops_per_s for r in results if r.matmul_flops_per_s is not None]


def objections(measured: Runs) -> dict[str, str]:
    """Why variants get no figure: they failed, or their losses are not what the others' are."""
    found: dict[str, str] = {}
    # Of those that take the same text: with documents, the peer takes another one.
    references: dict[int | None, StepResult] = {}
    for name in sorted(measured.specs, key=lambda name: name == PEER):
        spec = measured.specs[name]
        reasons = [r[name] for r in measured.rounds if name in r]
        failed = next((reason for reason in reasons if isinstance(reason, str)), None)
        results = measured.results(name)
        if failed is not None or not results:
            found[name] = failed or "it did not come to its turn"
            continue
        reference = references.get(spec.documents)
        wrong = next((text for r in results if (text := _wrong(r, reference, spec))), None)
        if wrong is not None:
            found[name] = wrong
        else:
            references.setdefault(spec.documents, results[0])
    return found


def _wrong(result: StepResult, reference: StepResult | None, spec: StepSpec) -> str | None:
    """What is wrong with a run's losses; they follow those of our first one that is right."""
    for number, loss in enumerate(result.losses, 1):
        if not math.isfinite(loss):
            return f"the loss of step {number} is {loss}"
    if reference is None:
        return None
    allowed = _ALLOWED[spec.config.training.precision]
    allowed *= _PEER_SLACK if spec.variant == PEER else 1
    pairs = zip(result.losses[:_COMPARED], reference.losses[:_COMPARED], strict=True)
    for number, (loss, other) in enumerate(pairs, 1):
        if abs(loss - other) > allowed * abs(other):
            return f"the loss of step {number} is {loss:.4f}, and another variant's is {other:.4f}"
    return None


def heading(words: Sequence[str], in_full: Sequence[str]) -> str:
    """Machine, versions, and the command as given and with all options."""
    versions = ", ".join(f"{n} {v}" for n, v in _versions().items() if v is not None)
    return (
        f"Machine: {this_machine()}; {versions}; {datetime.date.today()}.\n"
        f"{command_lines(words, in_full)}"
    )


def brief(found: StepResult | str) -> str:
    """A line on one run of a variant."""
    if isinstance(found, str):
        return found
    peak = "" if found.peak_bytes is None else f", peak {found.peak_bytes / _GIB:.2f} GiB"
    return f"{1e3 * statistics.median(found.step_s):.2f} ms per step{peak}"


def table(measured: Runs) -> str:
    """Title, table and what has to be said about it."""
    wrong = objections(measured)
    shown = [name for name in measured.specs if name not in wrong]
    baseline = next((name for name in _BASELINES if name in shown), None)
    heads = ["variant", "ms per step", "tokens/s"]
    heads += [f"speed over {baseline}"] if baseline else []
    heads += [
        "peak GiB (reserved)",
        "6N-MFU",
        "of the matmul limit",
        f"losses of steps 1 to {_COMPARED}",
    ]
    lines = [
        f"### {_title(measured)}",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    lines += ["| " + " | ".join(_cells(measured, name, baseline)) + " |" for name in shown]
    return "\n".join([*lines, "", *_notes(measured, wrong)])


def document(words: Sequence[str], in_full: Sequence[str], measured: Runs) -> dict[str, Any]:
    """Everything that was found, for --json."""
    return {
        "command": list(words),
        "command_in_full": list(in_full),
        "date": str(datetime.date.today()),
        "machine": asdict(this_machine()),
        "versions": _versions(),
        "records": [_record(measured, name) for name in measured.specs],
    }


def _title(measured: Runs) -> str:
    spec = next(iter(measured.specs.values()))
    model, training = spec.config.model, spec.config.training
    documents = max((s.documents or 0 for s in measured.specs.values()), default=0)
    devices = {r.device for name in measured.specs for r in measured.results(name)}
    return (
        f"{model.layer} d_model {model.d_model}, {model.n_layers} layers, vocabulary "
        f"{model.vocab_size}, {parameter_count(model):,} parameters, B{spec.batch} L{spec.length}"
        + (f", {spec.accumulation} micro-batches a step" if spec.accumulation > 1 else "")
        + f", {training.precision}, activation checkpointing {training.activation_checkpointing}"
        + (f", {documents} documents a row" if documents else "")
        + f", on {', '.join(sorted(devices)) or 'nothing that worked'}"
    )


def _cells(measured: Runs, name: str, baseline: str | None) -> list[str]:
    seconds = measured.seconds(name).scaled(1e3)
    record = _record(measured, name)
    cells = [
        _DESCRIPTIONS.get(name, f"our model, {name}"),
        f"{seconds.median:.2f} ({seconds.low:.2f}–{seconds.high:.2f})",
        f"{record['tokens_per_s']:,.0f}",
    ]
    if baseline:
        over = measured.speed_over(name, baseline)
        cells.append(f"{over.median:.3f}x ({over.low:.3f}–{over.high:.3f})")
    peak, reserved = record["peak_bytes"], record["peak_reserved_bytes"]
    mfu, share = record["mfu_6n"], record["share_of_matmul_limit"]
    return [
        *cells,
        "n/a" if peak is None else f"{peak / _GIB:.2f} ({reserved / _GIB:.2f})",
        "n/a" if mfu is None else f"{100 * mfu:.1f} %",
        "n/a" if share is None else f"{100 * share:.1f} %",
        " ".join(f"{loss:.4f}" for loss in measured.results(name)[0].losses[:_COMPARED]),
    ]


def _record(measured: Runs, name: str) -> dict[str, Any]:
    spec, results = measured.specs[name], measured.results(name)
    record: dict[str, Any] = {"variant": name, "tokens_per_step": spec.tokens}
    if not results:
        return record | {"wrong": objections(measured)[name]}
    seconds = measured.seconds(name)
    flops_per_s = 6 * parameter_count(spec.config.model) * spec.tokens / seconds.median
    peaks = [r.peak_bytes for r in results if r.peak_bytes is not None]
    reserved = [r.peak_reserved_bytes for r in results if r.peak_reserved_bytes is not None]
    limits = [r.matmul_flops_per_s for r in results if r.matmul_flops_per_s is not None]
    # One for all variants, or a variant would be the better for a device that was slow before it.
    limit = max(measured.matmul_limits, default=None)
    data_sheet = next((v for k, v in _PEAK_FLOPS_PER_S.items() if k in results[0].device), None)
    record |= {
        "step_s": vars(seconds),
        "tokens_per_s": spec.tokens / seconds.median,
        "peak_bytes": max(peaks, default=None),
        "peak_reserved_bytes": max(reserved, default=None),
        "mfu_6n": None if data_sheet is None else flops_per_s / data_sheet,
        "matmul_flops_per_s": statistics.median(limits) if limits else None,
        "share_of_matmul_limit": None if limit is None else flops_per_s / limit,
        "losses": [list(r.losses) for r in results],
    }
    profiles = [r.profile for r in results if r.profile is not None]
    if profiles:
        record["profile_s"] = by_category(profiles[0])
        record["profile_steps"] = profiles[0].steps
    wrong = objections(measured).get(name)
    return record if wrong is None else record | {"wrong": wrong}


def _notes(measured: Runs, wrong: Mapping[str, str]) -> list[str]:
    spec = next(iter(measured.specs.values()))
    limits = measured.matmul_limits
    notes = [
        f"Medians (smallest to largest) of {spec.steps} steps after {spec.warmup}, "
        f"{len(measured.rounds)} rounds; a step is forward, loss, backward, clipping and AdamW."
    ]
    if limits:
        low, high = min(limits) / 1e12, max(limits) / 1e12
        notes.append(
            f"6N-MFU is over 989 TFLOP/s; bf16 products of 8192 ran at {low:.0f} to {high:.0f}, "
            "of which the largest is the matmul limit of all variants."
        )
    if PEER in measured.specs and any(s.documents for s in measured.specs.values()):
        notes.append(f"{PEER} has no documents: it takes each row as one text.")
    if shared := [name for name in measured.specs if name in _OF_SEVERAL_RANKS]:
        notes.append(
            f"{', '.join(shared)}: as each of several ranks runs it, without the communication and "
            "with all of the optimizer's state; a training run on one rank takes zero-0."
        )
    if "fsdp2" in measured.specs:
        notes.append("fsdp2: as a training run on one rank has it, each layer's parameters copied.")
    notes += [f"**{name}: no figures**: {reason}" for name, reason in wrong.items()]
    return [*(f"- {note}" for note in notes), ""]


def _versions() -> dict[str, str | None]:
    return {name: package_version(name) for name in _PACKAGES}
