"""bench gpu-ops: each kernel on one GPU, beside mamba-ssm's and with its precision.

All variants of an op run in this process and take turns step by step, timed on the device with a
cold L2 cache. A variant whose results are wrong gets no figure; one that fails says so, and the
others go on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Final, TypeVar

import torch

from mamba_dist.commands.bench.cases import LETTERS, Case, Op
from mamba_dist.commands.bench.gpu.arguments import Option, in_full, names
from mamba_dist.commands.bench.gpu.clock import Clock, clock_of, copy_bytes_per_s
from mamba_dist.commands.bench.gpu.failures import Attempts, Failure
from mamba_dist.commands.bench.gpu.ops_report import (
    Measured,
    Steps,
    document,
    heading,
    precision_table,
    table,
)
from mamba_dist.commands.bench.gpu.peers import (
    OURS,
    PEERS,
    Inputs,
    expected_outputs,
    least_bytes,
    model_inputs,
    variant,
)
from mamba_dist.commands.bench.gpu.precision import (
    Job,
    Precision,
    Row,
    difference,
    largest_difference,
    output_gradients,
    precision,
)
from mamba_dist.commands.bench.spec import DTYPES
from mamba_dist.config.text import write_text
from mamba_dist.errors import BackendError

_Answer = TypeVar("_Answer")

_SHAPES: Final[Mapping[Op, tuple[tuple[int, ...], ...]]] = {
    "selective_scan": ((8, 2048, 4096, 16), (16, 2048, 1536, 16), (1, 16384, 4096, 16)),
    "ssd": ((8, 2048, 64, 64, 128, 1, 256), (1, 16384, 64, 64, 128, 1, 256)),
    "causal_conv1d": ((8, 2048, 4096, 4), (8, 2048, 4352, 4)),
    "add_rms_norm": ((8, 2048, 2048),),
    "gated_rms_norm": ((8, 2048, 4096, 1),),
    "linear_cross_entropy": ((8, 2048, 2048, 50280),),
}
_WITH_DOCUMENTS: Final = ("selective_scan", "ssd", "causal_conv1d")
# By the device, beside everything that ours is compared with on a GPU.
_DEFAULT_OURS: Final = {"cuda": ("gpu",), "cpu": ("torch", "cpu")}
_MIN_ROUNDS: Final = 5
_MAX_ROUNDS: Final = 100
# The first one compiles and tunes, the second one fills the allocator's cache.
_WARM_STEPS: Final = 3


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    sizes: Callable[[str], list[int]],
    seconds: Callable[[str], float],
) -> None:
    """Adds the options of this benchmark; `sizes` and `seconds` are types of arguments."""
    parser.add_argument("--op", action="append", choices=tuple(_SHAPES), help="only this one")
    parser.add_argument(
        "--shape", type=sizes, help="for one --op: its sizes, as 8,2048,4096,16 for selective_scan"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument(
        "--variants",
        type=names,
        help="these, as gpu,mamba-ssm; default gpu and everything it is compared with; without a "
        "GPU torch and cpu",
    )
    parser.add_argument(
        "--documents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also ours with packed documents, as in training; default yes",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=15.0,
        help="for the timed rounds of all tables together; default 15; 5 rounds at least",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong between arguments."""
    ops: Sequence[Op] = arguments.op or tuple(_SHAPES)
    if arguments.shape:
        if len(ops) != 1:
            return "--shape goes with exactly one --op"
        letters = LETTERS[ops[0]]
        if len(letters) != len(arguments.shape):
            return f"--shape: {ops[0]} has the sizes {','.join(letters)}"
        sizes = dict(zip(letters, arguments.shape, strict=True))
        for letter in "HD":
            if sizes.get(letter, 0) % sizes.get("G", 1):
                return f"--shape: {letter}{sizes[letter]} does not fall into G{sizes['G']} groups"
    known = {*OURS, *(peer for op in ops for peer in PEERS[op])}
    unknown = sorted(set(arguments.variants or ()) - known)
    if unknown:
        return f"--variants: {', '.join(unknown)} unknown here, expected {', '.join(sorted(known))}"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Whether every variant could be measured and is right; prints tables, and writes --json.

    Raises:
        BackendError: there is no such device.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device cuda: torch sees no GPU here; --device cpu tries the tool out")
    device = torch.device(arguments.device)
    clock = clock_of(device)
    copy = copy_bytes_per_s(clock, device)
    full = in_full("gpu-ops", _options(arguments))
    print(heading(words, full, device, copy), flush=True)
    attempts = Attempts(device)
    cases = _cases(arguments)
    measured: list[Measured] = []
    precisions: dict[Op, Precision] = {}
    try:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case}", file=sys.stderr)
            session = _Session(case, _rows(case.op, arguments), attempts)
            known = set(precisions)
            measured.append(session.measure(clock, arguments.seconds / len(cases), precisions))
            print(table(measured[-1], copy), flush=True)
            for op in precisions.keys() - known:
                print(precision_table(precisions[op]), flush=True)
    finally:
        if arguments.json is not None:
            content = document(words, full, device, copy, measured, precisions.values())
            write_text(json.dumps(content, indent=2) + "\n", arguments.json)
    return all(found.is_right for found in measured)


def _options(arguments: argparse.Namespace) -> list[Option]:
    """Everything that is in force."""
    return [
        *(("--op", op) for op in arguments.op or _SHAPES),
        ("--shape", arguments.shape and ",".join(map(str, arguments.shape))),
        ("--dtype", arguments.dtype),
        ("--variants", arguments.variants and ",".join(arguments.variants)),
        ("--documents" if arguments.documents else "--no-documents", True),
        ("--device", arguments.device),
        ("--seconds", arguments.seconds),
        ("--json", arguments.json),
    ]


def _cases(arguments: argparse.Namespace) -> list[Case]:
    dtype = DTYPES[arguments.dtype]
    return [
        Case(op, dict(zip(LETTERS[op], shape, strict=True)), dtype)
        for op in arguments.op or tuple(_SHAPES)
        for shape in ([arguments.shape] if arguments.shape else _SHAPES[op])
        if _rows(op, arguments)
    ]


def _rows(op: Op, arguments: argparse.Namespace) -> list[Row]:
    peers = PEERS[op] if arguments.device == "cuda" else ()
    asked = arguments.variants or (*_DEFAULT_OURS[arguments.device], *peers)
    rows = []
    for name in asked:
        if name not in OURS and name not in PEERS[op]:
            continue
        rows.append(Row(name))
        if arguments.documents and name in OURS and op in _WITH_DOCUMENTS:
            rows.append(Row(name, documents=True))
    return rows


class _Session:
    """One case's jobs that still run, and why the others don't."""

    def __init__(self, case: Case, rows: Sequence[Row], attempts: Attempts) -> None:
        self._case = case
        self._rows = rows
        self._attempts = attempts
        self._device = attempts.device
        self._jobs: dict[Row, Job] = {}
        self._absent: dict[Row, str] = {}
        self._least_bytes: dict[Row, tuple[int, int]] = {}
        self._warm_s: dict[Row, float] = {}

    def measure(self, clock: Clock, seconds: float, precisions: dict[Op, Precision]) -> Measured:
        """The case's figures; adds the op's precision to `precisions` if it is not there yet."""
        op = self._case.op
        # Before the comparison at small sizes: Triton tunes itself by the sizes it meets first.
        self._warm_up(clock)
        if op not in precisions:
            precisions[op] = precision(self._case, self._rows, self._attempts)
        wrong = {
            row: reason
            for row in self._rows
            if (reason := precisions[op].objections.get(row)) and row not in self._absent
        }
        differences = self._differences()
        for row in wrong:
            self._jobs.pop(row, None)
        return Measured(
            case=self._case,
            rows=self._rows,
            rounds=self._rounds(clock, seconds),
            absent=self._absent,
            wrong=wrong,
            least_bytes=self._least_bytes,
            warm_s=self._warm_s,
            differences={row: text for row, (text, _) in differences.items()},
            suspects=frozenset(row for row, (_, suspect) in differences.items() if suspect),
        )

    def _warm_up(self, clock: Clock) -> None:
        """Builds every job and takes it through what its first steps alone have to do."""
        for row in self._rows:
            started_at = time.monotonic()
            job = self._told(row, partial(self._warm_job, row, clock))
            if job is not None:
                self._jobs[row] = job
                self._warm_s[row] = time.monotonic() - started_at

    def _warm_job(self, row: Row, clock: Clock) -> Job:
        inputs = {n: t for n, t in self._inputs.items() if row.documents or n != "seq_idx"}
        outputs = expected_outputs(self._case.op, inputs)
        self._least_bytes[row] = least_bytes(self._case.op, inputs, outputs)
        built = variant(self._case, row.name, self._device)
        job = Job(self._case, built, inputs, self._gradients)
        for _ in range(_WARM_STEPS):
            _step(clock, job)
        return job

    @cached_property
    def _inputs(self) -> Inputs:
        return model_inputs(self._case, self._device)

    @cached_property
    def _gradients(self) -> Inputs:
        return output_gradients(expected_outputs(self._case.op, self._inputs))

    def _differences(self) -> dict[Row, tuple[str, bool]]:
        """How far ours are from a peer at the timed sizes, and whether that is too far."""
        peer = next((row for row in self._jobs if not row.is_ours), None)
        other = self._told(peer, self._jobs[peer].results) if peer else None
        found: dict[Row, tuple[str, bool]] = {}
        for row, job in list(self._jobs.items()):
            if other is None or not row.is_ours or row.documents:
                continue
            apart = self._told(row, partial(_difference_from, other, job))
            if apart is not None:
                name, error = apart
                # NaN compares false.
                suspect = not error <= largest_difference(self._case, self._device)
                found[row] = (
                    f"differs from {peer} at these sizes by at most {error:.1e}, in {name}, "
                    "as ||x - y|| / ||y||",
                    suspect,
                )
        return found

    def _rounds(self, clock: Clock, seconds: float) -> list[dict[Row, Steps]]:
        ends_at = time.monotonic() + seconds
        found: list[dict[Row, Steps]] = []
        while self._jobs and len(found) < _MAX_ROUNDS:
            if len(found) >= _MIN_ROUNDS and time.monotonic() >= ends_at:
                break
            if found and self._attempts.lost is not None:
                # What has been measured stands; another step could only fail.
                break
            taken: dict[Row, Steps] = {}
            found.append(taken)
            for row, job in list(self._jobs.items()):
                if self._attempts.lost is not None and row in found[0]:
                    continue
                steps = self._told(row, partial(_step, clock, job))
                if steps is not None:
                    taken[row] = steps
        return found

    def _told(self, row: Row, call: Callable[[], _Answer]) -> _Answer | None:
        """What the call returns; None if it failed, which ends the row."""
        answer = self._attempts.told(f"{row} in {self._case}", call)
        if isinstance(answer, Failure):
            self._absent[row] = answer.reason
            self._jobs.pop(row, None)
            return None
        return answer


def _difference_from(other: Inputs, job: Job) -> tuple[str, float]:
    return difference(job.results(), other)


def _step(clock: Clock, job: Job) -> Steps:
    (forward,) = clock.seconds(job.infer)
    kept, backward = clock.seconds(job.forward, job.backward)
    return Steps(forward, backward, kept + backward)
