"""What the folder of a run tells: how far it is, how fast, and how each of its starts ended.

While the run goes on or after it, also of a copy that is read-only. No torch.
"""

import json
import socket
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mamba_dist.checkpoint.layout import MANIFEST, checkpoint_folder, committed_steps
from mamba_dist.commands.submission import submitted_jobs
from mamba_dist.telemetry.log import log_file
from mamba_dist.telemetry.merged_log import last_sign_of_life, last_words
from mamba_dist.telemetry.metrics import METRICS_FILE, readable_metrics, standing
from mamba_dist.telemetry.starts import STARTS_FILE, Start, is_held, read_starts

_RATE_RECORDS = 20
_SHOWN_FAULTS = 3
# Clocks of nodes may differ by as much where munge lets SLURM in; a start can end sooner than that.
_CLOCK_SLACK_S = 300.0
# Of times that retention may delete what was just listed.
_LOOKS = 5

State = Literal["running", "ended", "killed", "unknown"]


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest committed one; whether it is whole is not looked at."""

    folder: str
    step: int
    saved_at: float
    size_bytes: int
    files: int
    has_manifest: bool


@dataclass(frozen=True)
class Fault:
    """An error that ended ranks, or None that they left no word of an end."""

    ranks: tuple[int, ...]
    text: str | None
    log: str


@dataclass(frozen=True)
class Status:
    """What a run folder tells; None or empty is what it does not."""

    run_dir: str
    state: State
    last_sign_at: float | None
    step: int | None
    total_steps: int | None
    tokens: int | None
    loss: float | None
    val_loss: float | None
    val_step: int | None
    tokens_per_s: float | None
    step_s: float | None
    remaining_s: float | None
    skipped_steps: int
    rollbacks: int
    starts: tuple[Start, ...]
    faults: tuple[Fault, ...]
    checkpoint: LastCheckpoint | None
    checkpoints: int
    unreadable_records: int
    """Lines of metrics.jsonl that are none."""
    last_job: str | None
    """The one that was submitted last, by launch/submit.py."""


def status_of(run_dir: Path) -> Status:
    """What the folder of a run tells.

    Raises:
        OSError: it cannot be read.
    """
    starts, (records, unreadable) = read_starts(run_dir), readable_metrics(run_dir)
    newest = starts[-1] if starts else None
    done = None if newest is None else newest.last_step
    if newest is not None and newest.reason is not None and done is None:
        # It ended before its first step: what an earlier start did after that is not done.
        done = newest.first_step
    lasting = [r for r in standing(records) if done is None or (r["step"] or 0) <= done]
    trained = [record for record in lasting if "loss" in record]
    validated = [record for record in lasting if "val_loss" in record]
    last = trained[-1] if trained else {}
    state, sign = _state(run_dir, newest)
    step = _whole(last.get("step")) if done is None else done
    total = next((start.total_steps for start in reversed(starts) if start.total_steps), None)
    step_s = _recent(trained, "step_s")
    checkpoint, steps = _newest_checkpoint(run_dir)
    return Status(
        run_dir=str(run_dir),
        state=state,
        last_sign_at=sign,
        step=step,
        total_steps=total,
        tokens=_whole(last.get("tokens")),
        loss=last.get("loss"),
        val_loss=validated[-1]["val_loss"] if validated else None,
        val_step=_whole(validated[-1]["step"]) if validated else None,
        tokens_per_s=_recent(trained, "tokens_per_s"),
        step_s=step_s,
        remaining_s=None
        if step is None or total is None or step_s is None
        else max(0, total - step) * (step_s + _validation_s_per_step(validated)),
        skipped_steps=sum(int(record.get("skipped_steps") or 0) for record in trained),
        rollbacks=sum("rolled_back_from" in record for record in records),
        starts=tuple(starts),
        faults=tuple(_faults(run_dir, newest, state)),
        checkpoint=checkpoint,
        checkpoints=len(steps),
        unreadable_records=unreadable,
        last_job=next(reversed(submitted_jobs(run_dir)), None),
    )


def _state(run_dir: Path, newest: Start | None) -> tuple[State, float | None]:
    """Whether it goes on, and its last sign of life."""
    signs = [last_sign_of_life(run_dir)]
    for name in (METRICS_FILE, STARTS_FILE):
        with suppress(FileNotFoundError):
            signs.append((run_dir / name).stat().st_mtime)
    sign = max((each for each in signs if each is not None), default=None)
    held = is_held(run_dir)
    if held:
        return "running", sign
    if newest is not None and newest.reason is not None:
        return "ended", sign
    # From another host a free lock says nothing where the file system keeps locks to each host.
    if held is None or newest is None or newest.hosts[:1] != (socket.gethostname(),):
        return "unknown", sign
    return "killed", sign


def _faults(run_dir: Path, newest: Start | None, state: State) -> Iterator[Fault]:
    """What ended the last start, if its ranks tell differently; a few, where each tells its own."""
    if newest is None or newest.ranks < 2 or state == "running":
        return
    if newest.reason in ("finished", "stopped", "interrupted"):
        return
    words = last_words(run_dir, since=newest.at - _CLOCK_SLACK_S)
    by_text: dict[str | None, list[int]] = {}
    ended_at: dict[str | None, float] = {}
    for rank in range(newest.ranks):
        word = words.get(rank)
        text = word.text if word is not None else None
        by_text.setdefault(text, []).append(rank)
        at = word.at if word is not None else float("inf")
        ended_at[text] = min(at, ended_at.get(text, at))
    if len(by_text) < 2 and None not in by_text:
        return
    # The first to end is most likely the cause, and what the others say is that it was gone; so is
    # one that was killed, of which nobody knows when.
    shown = sorted(by_text, key=lambda each: ended_at[each])[:_SHOWN_FAULTS]
    if None in by_text and None not in shown:
        shown.append(None)
    for text in shown:
        log = log_file(run_dir, by_text[text][0])
        yield Fault(tuple(by_text[text]), text, str(log))


def _newest_checkpoint(run_dir: Path) -> tuple[LastCheckpoint | None, list[int]]:
    """The newest, and the steps of all; a run that goes on may delete what was just listed."""
    for look in range(_LOOKS):
        steps = committed_steps(run_dir)
        try:
            return _checkpoint(checkpoint_folder(run_dir, steps[-1])) if steps else None, steps
        except FileNotFoundError:
            if look == _LOOKS - 1:
                raise
    raise AssertionError("the last look returns or raises")


def _checkpoint(folder: Path) -> LastCheckpoint:
    files = [path.stat() for path in folder.iterdir()]
    manifest, saved_at = folder / MANIFEST, folder.stat().st_mtime
    # A copy may have times of its own. Whether the manifest is whole is not this tool's question.
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        saved_at = float(json.loads(manifest.read_bytes())["manifest"]["saved_at"])
    return LastCheckpoint(
        folder=str(folder),
        step=int(folder.name.removeprefix("step-")),
        saved_at=saved_at,
        size_bytes=sum(file.st_size for file in files),
        files=len(files),
        has_manifest=manifest.is_file(),
    )


def _recent(trained: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = [value for r in trained[-_RATE_RECORDS:] if (value := r.get(name)) is not None]
    return statistics.median(values) if values else None


def _validation_s_per_step(validated: Sequence[Mapping[str, float | None]]) -> float:
    if len(validated) < 2:
        return 0.0
    one, other = validated[-2:]
    steps = (other["step"] or 0) - (one["step"] or 0)
    return (other["seconds"] or 0.0) / steps if steps > 0 else 0.0


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
