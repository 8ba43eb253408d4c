"""tools/run_status.py: how far a run is, how fast, and how each of its starts ended.

From the run folder alone, while the run goes on or after it, also on a copy that is read-only. No
torch, so that it answers within a second. Exit codes: 0 done; 2 a mistake that the message
explains; anything else is a crash.
"""

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mamba_dist.checkpoint.layout import CHECKPOINTS, MANIFEST, checkpoint_folder, committed_steps
from mamba_dist.errors import MambaDistError, TrainingError
from mamba_dist.telemetry.log import LOGS, log_file
from mamba_dist.telemetry.merged_log import (
    describe,
    last_sign_of_life,
    last_words,
    merged,
    numbered,
)
from mamba_dist.telemetry.metrics import METRICS_FILE, read_metrics
from mamba_dist.telemetry.starts import STARTS_FILE, Start, is_held, read_starts

EXIT_USER_ERROR = 2
_RATE_RECORDS = 20
_SHOWN_STARTS = 10
_SHOWN_FAULTS = 3
# Clocks of nodes differ a little.
_CLOCK_SLACK_S = 5.0

State = Literal["running", "ended", "killed", "unknown"]


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest committed one; whether it is whole is not looked at."""

    folder: str
    step: int
    saved_at: float
    size_bytes: int
    files: int


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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`; what was found goes to stdout."""
    arguments = _parser().parse_args(argv)
    try:
        _require_run_folder(arguments.run)
        if arguments.log:
            _print_log(arguments.run)
            return 0
        status = status_of(arguments.run)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if arguments.json:
        print(json.dumps(asdict(status), indent=2))
    else:
        for line in _lines(status, now=time.time()):
            print(line)
    return 0


def status_of(run_dir: Path) -> Status:
    """What the folder of a run tells.

    Raises:
        TrainingError: it cannot be read.
    """
    try:
        return _status(run_dir)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or run_dir}: cannot be read ({error.strerror}); look as the user who "
            "trains"
        ) from error


def _status(run_dir: Path) -> Status:
    starts, records = read_starts(run_dir), read_metrics(run_dir)
    trained = [record for record in records if "loss" in record]
    validated = [record for record in records if "val_loss" in record]
    last = trained[-1] if trained else {}
    newest = starts[-1] if starts else None
    state, sign = _state(run_dir, newest)
    step = _whole(last.get("step"))
    if newest is not None and newest.last_step is not None:
        step = newest.last_step
    total = next((start.total_steps for start in reversed(starts) if start.total_steps), None)
    step_s = _recent(trained, "step_s")
    steps = committed_steps(run_dir)
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
        # Of a step that was trained twice, the later line counts.
        skipped_steps=sum(
            int(count or 0) for count in {r["step"]: r["skipped_steps"] for r in trained}.values()
        ),
        rollbacks=sum("rolled_back_from" in record for record in records),
        starts=tuple(starts),
        faults=tuple(_faults(run_dir, newest, state)),
        checkpoint=_checkpoint(checkpoint_folder(run_dir, steps[-1])) if steps else None,
        checkpoints=len(steps),
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
    """What ended the last start on ranks whose logs say other than the first one's."""
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
    # The first to end is most likely the cause, and what the others say is that it was gone.
    for text in sorted(by_text, key=lambda each: ended_at[each])[:_SHOWN_FAULTS]:
        log = log_file(run_dir, by_text[text][0])
        yield Fault(tuple(by_text[text]), text, str(log))


def _checkpoint(folder: Path) -> LastCheckpoint:
    files = [path.stat() for path in folder.iterdir()]
    manifest = folder / MANIFEST
    saved_at = manifest.stat().st_mtime
    # A copy may have times of its own. Whether the manifest is whole is not this tool's question.
    with suppress(ValueError, KeyError, TypeError):
        saved_at = float(json.loads(manifest.read_bytes())["manifest"]["saved_at"])
    return LastCheckpoint(
        folder=str(folder),
        step=int(folder.name.removeprefix("step-")),
        saved_at=saved_at,
        size_bytes=sum(file.st_size for file in files),
        files=len(files),
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


def _lines(status: Status, *, now: float) -> Iterator[str]:
    yield status.run_dir
    yield f"  state        {_state_text(status, now)}"
    done = "no step is recorded" if status.step is None else f"{status.step:,}"
    if status.step is not None and status.total_steps:
        share = 100 * status.step / status.total_steps
        done += f" of {status.total_steps:,} ({share:.1f} %)"
    yield f"  step         {done}"
    if status.tokens is not None:
        yield f"  tokens       {status.tokens:,} trained on"
        yield f"  loss         {_number(status.loss)}" + (
            ""
            if status.val_step is None
            else f"; validation {_number(status.val_loss)} at step {status.val_step:,}"
        )
    if status.tokens_per_s is not None and status.step_s is not None:
        yield f"  speed        {status.tokens_per_s:,.0f} tokens/s, {status.step_s:.3g} s a step"
    if status.remaining_s is not None and status.state in ("running", "unknown"):
        end = _moment(now + status.remaining_s)
        yield f"  ETA          {_span(status.remaining_s)}, {end} UTC, without waits for saves"
    if status.skipped_steps or status.rollbacks:
        yield f"  skipped      {status.skipped_steps:,} steps; {status.rollbacks} rollbacks"
    yield f"  checkpoint   {_checkpoint_text(status, now)}"
    if not status.starts:
        yield f"  starts       not recorded: there is no {STARTS_FILE}"
        return
    yield f"  restarts     {len(status.starts) - 1}"
    first = max(0, len(status.starts) - _SHOWN_STARTS)
    if first:
        yield f"    {first} older starts: see {STARTS_FILE}"
    for number, start in enumerate(status.starts[first:], first + 1):
        yield f"    {number:>3}  {_start_text(start, status, last=number == len(status.starts))}"
    for fault in status.faults:
        text = fault.text or "no word of an end: killed, or the node was lost"
        yield f"         {numbered('rank', fault.ranks)}: {_first_line(text)}, see {fault.log}"


def _state_text(status: Status, now: float) -> str:
    newest = status.starts[-1] if status.starts else None
    where = ""
    if newest is not None:
        job = f", job {newest.job}" if newest.job else ""
        where = f" on {_hosts(newest)} ({newest.ranks} ranks, {newest.launcher}{job})"
    seen = ""
    if status.last_sign_at is not None:
        seen = f", last sign of life {_span(now - status.last_sign_at)} ago"
    if status.state == "running":
        return f"running{where}{seen}"
    if status.state == "killed":
        return f"not running: killed, or its node was lost{seen}"
    if status.state == "ended" and newest is not None:
        return f"not running: {newest.reason}{seen}"
    return f"unknown from this host{where}{seen}"


def _start_text(start: Start, status: Status, *, last: bool) -> str:
    began = f"{_moment(start.at)}  {start.ranks} ranks, {start.launcher}"
    if start.job:
        began += f", job {start.job}"
    if start.first_step is None:
        span = "did not come to train"
    else:
        span = f"from step {start.first_step:,}"
        span += "" if start.last_step is None else f" to {start.last_step:,}"
    if start.reason is not None:
        detail = f": {_first_line(start.detail)}" if start.detail else ""
        return f"{began}, {span}; {start.reason}{detail} (exit code {start.exit_code})"
    if last and status.state == "running":
        return f"{began}, {span}; goes on"
    if last and status.state == "unknown":
        return f"{began}, {span}; goes on, or was killed"
    return f"{began}, {span}; killed, or its node was lost"


def _checkpoint_text(status: Status, now: float) -> str:
    found = status.checkpoint
    if found is None:
        return "none is committed"
    size = (
        f"{found.size_bytes / 1e9:.2f} GB"
        if found.size_bytes >= 1e9
        else (f"{found.size_bytes / 1e6:.1f} MB")
    )
    return (
        f"step {found.step:,}, {_span(now - found.saved_at)} old, {size} in {found.files} files, "
        f"committed (not verified); {status.checkpoints} in all"
    )


def _print_log(run_dir: Path) -> None:
    if not (run_dir / LOGS).is_dir():
        raise TrainingError(
            f"{run_dir}: there is no folder {LOGS}; the run is of an older version, whose log is "
            "what its launcher kept"
        )
    for line in describe(merged(run_dir)):
        print(line)


def _require_run_folder(path: Path) -> None:
    marks = (STARTS_FILE, METRICS_FILE, CHECKPOINTS, "config.yaml")
    if not path.is_dir():
        raise TrainingError(f"{path}: is no folder; name the run's (training.run_dir)")
    if not any((path / mark).exists() for mark in marks):
        raise TrainingError(
            f"{path}: is no run folder, it holds none of {', '.join(marks)}; name the run's "
            "(training.run_dir)"
        )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _hosts(start: Start) -> str:
    more = len(start.hosts) - 4
    return ", ".join(start.hosts[:4]) + f" and {more} more" * (more > 0)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _span(seconds: float) -> str:
    seconds = max(0, round(seconds))
    for size, name, rest_size, rest in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // rest_size} {rest}"
    return f"{seconds} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/run_status.py",
        description="Show how far a run is, how fast, its last checkpoint, and how each of its "
        "starts ended; from the run folder alone, also while the run goes on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (training.run_dir)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print it all as JSON")
    shape.add_argument(
        "--log",
        action="store_true",
        help="print the logs of all ranks as one, in order of time; what several say alike once",
    )
    return parser
