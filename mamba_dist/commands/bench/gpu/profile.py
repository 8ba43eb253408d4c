"""Where the time of a training step goes on a GPU: by kind of work, and by kernel."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_STEPS: Final = 3
_TOP: Final = 15
_NAME_LENGTH: Final = 90

GAPS: Final = "gaps between kernels"
OTHER: Final = "other kernels"
# Kind of work, and what names of its kernels hold, in lower case. The first match counts: a norm of
# gradients must be found before the norms of the model, a backward before the forward.
CATEGORIES: Final[Mapping[str, tuple[str, ...]]] = {
    "communication": ("nccl",),
    "optimizer and clipping": ("multi_tensor_apply", "lpnorm", "normtwoops", "fusedadam"),
    "cross-entropy": ("cross_entropy", "softmax", "nll_loss", "logsumexp"),
    "scan or SSD, backward": (
        "selective_scan_bwd",
        "selective_scan_backward",
        "chunk_scan_bwd",
        "chunk_scan_chunk_state_bwd",
        "chunk_state_bwd",
        "state_passing_bwd",
        "bmm_chunk_bwd",
        "chunk_cumsum_bwd",
        "score_gradients",
        "state_gradients",
        "finish_steps",
    ),
    "scan or SSD, forward": (
        "selective_scan",
        "chunk_scan_fwd",
        "chunk_state_fwd",
        "state_passing_fwd",
        "bmm_chunk_fwd",
        "chunk_cumsum_fwd",
        "scan_chunks",
        "carry_states",
        "pass_states",
        "prepare_steps",
    ),
    "convolution": ("conv1d",),
    "norm": ("norm",),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "embedding": ("embedding", "indexselect", "index_select"),
    "casts, copies, elementwise": (
        "elementwise",
        "memcpy",
        "memset",
        "copy",
        "catarray",
        "reduce_kernel",
    ),
}


@dataclass(frozen=True)
class Span:
    """One run of a kernel, or a copy by the device: its name, and when it ran in microseconds."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Profile:
    """Some steps on the device. wall_s: of all of them. busy_s: in which anything ran."""

    steps: int
    wall_s: float
    busy_s: float
    seconds: Mapping[str, float]
    """By kernel, over all steps."""
    counts: Mapping[str, int]


def category(kernel: str) -> str:
    """The kind of work that a kernel's name tells."""
    lower = kernel.lower()
    for name, patterns in CATEGORIES.items():
        if any(pattern in lower for pattern in patterns):
            return name
    return OTHER


def profiled(step: Any) -> Profile:
    """Some steps of `step`, which must have been warmed up, on the current GPU."""
    # The profiler's own start takes place in the first of its steps.
    with profile(activities=[ProfilerActivity.CUDA]):
        step()
        torch.cuda.synchronize()
    start, end = timing_event(), timing_event()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start.record()
        for _ in range(_STEPS):
            step()
        end.record()
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        # Annotations are drawn over the kernels that they enclose.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return summary(spans, steps=_STEPS, wall_s=start.elapsed_time(end) / 1e3)


def timing_event() -> torch.cuda.Event:
    """A mark on a stream that tells when the device has come to it."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def summary(spans: Iterable[Span], *, steps: int, wall_s: float) -> Profile:
    """The profile of some spans, which may overlap if they ran on several streams."""
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    busy_us, covered_until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        seconds[span.name] = seconds.get(span.name, 0.0) + (span.end_us - span.start_us) / 1e6
        counts[span.name] = counts.get(span.name, 0) + 1
        busy_us += max(0.0, span.end_us - max(span.start_us, covered_until))
        covered_until = max(covered_until, span.end_us)
    return Profile(steps, wall_s, busy_us / 1e6, seconds, counts)


def by_category(found: Profile) -> dict[str, float]:
    """Seconds of all steps by kind of work, largest first, with the gaps at the end."""
    sums: dict[str, float] = {}
    for kernel, seconds in found.seconds.items():
        sums[category(kernel)] = sums.get(category(kernel), 0.0) + seconds
    ordered = sorted(sums.items(), key=lambda pair: -pair[1])
    return {**dict(ordered), GAPS: max(0.0, found.wall_s - found.busy_s)}


def profile_tables(title: str, found: Profile) -> str:
    """Markdown: time by kind of work, then the kernels that take most of it."""
    lines = [
        f"### {title}: {found.wall_s / found.steps * 1e3:.2f} ms per step while profiled",
        "",
        "| work | ms per step | share of the step |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {seconds / found.steps * 1e3:.2f} | {100 * seconds / found.wall_s:.1f} % |"
        for name, seconds in by_category(found).items()
    ]
    overlap_s = sum(found.seconds.values()) - found.busy_s
    lines += [
        "",
        f"- Kernels overlap for {overlap_s / found.steps * 1e3:.2f} ms per step, counted twice.",
        "",
        "| kernel | work | ms per step | calls per step |",
        "|---|---|---|---|",
    ]
    longest = sorted(found.seconds.items(), key=lambda pair: -pair[1])[:_TOP]
    lines += [
        f"| `{_short(name)}` | {category(name)} | {seconds / found.steps * 1e3:.2f} | "
        f"{found.counts[name] / found.steps:.0f} |"
        for name, seconds in longest
    ]
    return "\n".join([*lines, ""])


def _short(kernel: str) -> str:
    """A name that fits into a table's cell."""
    name = kernel.replace("|", "/").replace("`", "'")
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
