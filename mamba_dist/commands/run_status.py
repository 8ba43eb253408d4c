"""tools/run_status.py: how far a run is, how fast, and how each of its starts ended.

From the run folder alone, while the run goes on or after it, also on a copy that is read-only. No
torch, so that it answers soon: reading 50,000 steps takes a second.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from mamba_dist.checkpoint.layout import CHECKPOINTS
from mamba_dist.commands.run_state import Status, status_of
from mamba_dist.errors import MambaDistError, TrainingError
from mamba_dist.telemetry.log import LOGS
from mamba_dist.telemetry.merged_log import describe, merged, numbered
from mamba_dist.telemetry.metrics import METRICS_FILE
from mamba_dist.telemetry.starts import STARTS_FILE, Start

EXIT_USER_ERROR = 2
_SHOWN_STARTS = 10
_SHOWN_LINES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`; what was found goes to stdout."""
    arguments = _parser().parse_args(argv)
    try:
        _require_run_folder(arguments.run)
        told = _log_lines(arguments.run) if arguments.log else _status_lines(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        where, why = error.filename or arguments.run, error.strerror
        print(f"error: {where}: cannot be read ({why}); look as who trains", file=sys.stderr)
        return EXIT_USER_ERROR
    for line in told:
        print(line)
    return 0


def _status_lines(arguments: argparse.Namespace) -> Iterable[str]:
    status = status_of(arguments.run)
    if arguments.json:
        return [json.dumps(asdict(status), indent=2)]
    return _lines(status, now=time.time())


def _lines(status: Status, *, now: float) -> Iterator[str]:
    yield status.run_dir
    yield f"  state        {_state_text(status, now)}"
    done = "no step is recorded" if status.step is None else f"{status.step:,}"
    if status.step is not None and status.total_steps:
        share = 100 * status.step / status.total_steps
        done += (
            f" of {status.total_steps:,} ({share:.1f} %)"
            if share <= 100
            else f"; the last start that trained was to end at {status.total_steps:,}"
        )
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
    if status.unreadable_records:
        yield f"  unreadable   {status.unreadable_records:,} lines of {METRICS_FILE}"
    yield f"  checkpoint   {_checkpoint_text(status, now)}"
    if not status.starts:
        yield f"  starts       none is recorded in {STARTS_FILE}"
        return
    yield f"  restarts     {len(status.starts) - 1}"
    first = max(0, len(status.starts) - _SHOWN_STARTS)
    if first:
        yield f"    {first} older starts: see {STARTS_FILE}"
    for number, start in enumerate(status.starts[first:], first + 1):
        yield f"    {number:>3}  {_start_text(start, status, last=number == len(status.starts))}"
    # Several problems at a start stand in a line each.
    for line in status.starts[-1].detail.splitlines()[1:_SHOWN_LINES]:
        yield f"         {line}"
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
    if newest is None:
        job = f"; last submitted as job {status.last_job}" if status.last_job else ""
        return f"unknown: no start is recorded{job}{seen}"
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
        + ("committed (not verified)" if found.has_manifest else "not whole: without its manifest")
        + f"; {status.checkpoints} in all"
    )


def _log_lines(run_dir: Path) -> Iterable[str]:
    if not (run_dir / LOGS).is_dir():
        raise TrainingError(
            f"{run_dir}: there is no folder {LOGS}; the run is of an older version, whose log is "
            "what its launcher kept"
        )
    return describe(merged(run_dir))


def _require_run_folder(path: Path) -> None:
    marks = (STARTS_FILE, METRICS_FILE, CHECKPOINTS, "config.yaml", "submissions")
    if not path.is_dir():
        raise TrainingError(f"{path}: is no folder; name the run's (training.run_dir)")
    if not any((path / mark).exists() for mark in marks):
        raise TrainingError(
            f"{path}: is no run folder, it holds none of {', '.join(marks)}; name the run's "
            "(training.run_dir)"
        )


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
