"""One record per logged step or validation, to every sink: metrics.jsonl, TensorBoard, the console.

Records are already reduced over ranks when they come here; only rank 0 writes. A run that resumes,
or goes back to a checkpoint, appends to metrics.jsonl, so a step that was trained twice stands
there twice, the later line being the one that counts. Going back has a line of its own in between.

Reads without torch what it wrote (tools/run_status.py).
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from mamba_dist.telemetry.progress import Progress

METRICS_FILE = "metrics.jsonl"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainRecord:
    """One logged stretch of training; rates and means are since the record before."""

    step: int
    loss: float
    """Nats per token, mean over the stretch's valid labels."""
    learning_rate: float
    grad_norm: float
    """Of the last step, before clipping."""
    skipped_steps: int
    tokens: int
    """Valid labels trained on since the start of the run."""
    unlabelled_share: float
    """Of the stretch's positions, those that predict nothing: padding, or with data.packing concat
    the last token of each document."""
    tokens_per_s: float
    """Valid labels, over all ranks."""
    tokens_per_s_per_device: float
    model_tflops_per_s: float
    """Derived FLOPs of forward and backward for those labels, over all ranks; what is spent on
    padding counts as nothing."""
    step_s: float
    data_wait_s: float
    """Of each step, waiting for the loader."""
    peak_memory_gib: float
    """Of this process: allocated on a GPU, resident otherwise."""


@dataclass(frozen=True)
class ValidationRecord:
    """One pass over the validation sequences."""

    step: int
    val_loss: float
    """Nats per token."""
    val_tokens: int
    seconds: float


@dataclass(frozen=True)
class RollbackRecord:
    """The run went back to the checkpoint of `step`; records of later steps before this one are of
    steps that are trained again."""

    step: int
    rolled_back_from: int
    first_skipped_sample: int
    last_skipped_sample: int


Record = TrainRecord | ValidationRecord | RollbackRecord


class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Makes what was written durable."""


class JsonlSink:
    """Appends one JSON object per record to metrics.jsonl.

    What a full disk did not take is written with the next record, so that none is lost or cut.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        _drop_cut_line(self._path)
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: Record) -> None:
        # JSON has no NaN; a skipped step's norm becomes null.
        fields = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(record).items()
        }
        self._unwritten += (json.dumps(fields) + "\n").encode()
        self._append()

    def close(self) -> None:
        try:
            self._append()
        finally:
            self._file.close()

    def _append(self) -> None:
        if not self._is_in_place():
            # Into a folder that was renamed, another run may write by now.
            moved, self._file = self._file, self._path.open("ab", buffering=0)
            moved.close()
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _is_in_place(self) -> bool:
        try:
            named = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._file.fileno()))


class ConsoleSink:
    """One line per record, printed so that the progress bar keeps its place; none for a rollback,
    which the log tells."""

    def __init__(self, bar: Progress, total_steps: int) -> None:
        self._bar = bar
        self._total_steps = total_steps

    def write(self, record: Record) -> None:
        where = f"step {record.step}/{self._total_steps}"
        if isinstance(record, TrainRecord):
            self._bar.show(
                f"{where}  loss {record.loss:.4f}  lr {record.learning_rate:.2e}  "
                f"grad norm {record.grad_norm:.2f}  {record.tokens_per_s:,.0f} tokens/s"
            )
        elif isinstance(record, ValidationRecord):
            self._bar.show(
                f"{where}  validation loss {record.val_loss:.4f} "
                f"(perplexity {math.exp(min(record.val_loss, 50)):,.1f}, "
                f"{record.val_tokens:,} tokens, {record.seconds:.1f} s)"
            )

    def close(self) -> None:
        self._bar.close()


class Metrics:
    """All sinks of a run; empty on every rank but 0.

    A sink that the disk refuses, full or gone, is no reason to end a run: it is said, once until it
    works again.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._failing: set[Sink] = set()

    def write(self, record: Record) -> None:
        """Sends one record to every sink."""
        for sink in self._sinks:
            try:
                sink.write(record)
            except OSError as error:
                if sink not in self._failing:
                    self._failing.add(sink)
                    _log.error(
                        "%s cannot write its records (%s); training goes on, and each record is "
                        "another try",
                        type(sink).__name__,
                        error,
                    )
            else:
                if sink in self._failing:
                    self._failing.remove(sink)
                    _log.warning("%s writes its records again", type(sink).__name__)

    def close(self) -> None:
        """Makes what was written durable."""
        for sink in self._sinks:
            try:
                sink.close()
            except OSError as error:
                _log.error("%s could not write its last records (%s)", type(sink).__name__, error)


def _drop_cut_line(path: Path) -> None:
    """Ends the file after its last whole line; a kill while writing leaves less than a line."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        with path.open("r+b") as file:
            file.truncate(len(whole[0]) + len(whole[1]))


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """All records of a run, oldest first; a last line cut short by a kill is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
