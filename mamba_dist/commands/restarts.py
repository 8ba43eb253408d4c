"""Whether a training job of SLURM starts again: `python -m mamba_dist.commands.restarts`, called by
launch/slurm/train.sbatch before and after the ranks, and when it is terminated.

Each start leaves lines in restarts.jsonl of the run folder. A start makes progress if there is a
newer checkpoint than any that the job had seen. Whatever ended the ranks, the job goes back into
the queue unless the ranks say that it would happen again (2, 65), starts without progress were too
many in a row, or all starts were. A start that SLURM ends by itself (cancelled, preempted, a node
that failed) is SLURM's to repeat, and counts for the last of these alone; but not one that it ends
at the time limit, since the ranks did not hear the signal before or took too long.

Exit codes: `began`: 0 go on; 2 do not. `terminated`: 0. `ended`: the code of the ranks.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.checkpoint.staged import written_steps
from mamba_dist.commands.scheduler import JobState, job_state, requeue
from mamba_dist.commands.submission import changed_versions
from mamba_dist.commands.train import arguments_parser
from mamba_dist.config.load import load_config
from mamba_dist.errors import CheckpointError, DivergedError, MambaDistError, TrainingError
from mamba_dist.train.stop import EXIT_STOPPED

RECORD = "restarts.jsonl"

_WOULD_HAPPEN_AGAIN = {
    MambaDistError.exit_code: "a mistake that the log above explains",
    DivergedError.exit_code: "training is broken, as the log above explains",
}
_BY_SIGNAL = 128


What = Literal["began", "out of time", "ended", "ended by SLURM"]


@dataclass(frozen=True)
class Event:
    """The begin or the end of one start of a job."""

    job: str
    start: int
    """Counted from 1."""
    event: What
    checkpoint: int | None
    """Step of the newest one at that time."""
    time: str
    exit_code: int | None = None
    decision: str = ""


@dataclass(frozen=True)
class Bounds:
    """How often a job starts again at most."""

    restarts: int
    """In all."""
    in_vain: int
    """Starts in a row without progress, the first one included."""


def starts_in_vain(events: Sequence[Event]) -> int:
    """How many starts in a row, up to the last event, ended by themselves without progress.

    A start that goes back, past a damaged checkpoint or past broken training, has what it makes
    from there counted as progress; but not for ever, if starts go back again and again.
    """
    last, best, in_vain, went_back = -1, -1, 0, 0
    for event in events:
        newest = -1 if event.checkpoint is None else event.checkpoint
        if newest > last:
            in_vain = 0
        elif newest < last:
            went_back += 1
        elif event.event in ("ended", "out of time"):
            in_vain += 1
        if newest > best:
            best, went_back = newest, 0
        last = newest
    return max(in_vain, went_back)


def why_not_again(
    code: int | None, *, state: JobState, restarts: int, in_vain: int, bounds: Bounds
) -> str | None:
    """Why a job whose ranks ended with `code` (None: not yet) does not start again, None if it
    does.

    `restarts` were before; `in_vain` is `starts_in_vain`, the start that just ended included.
    """
    if code in _WOULD_HAPPEN_AGAIN:
        return f"{_WOULD_HAPPEN_AGAIN[code]} would happen again"
    if not state.may_be_requeued:
        return "it was submitted without --requeue"
    if restarts >= bounds.restarts:
        return f"it was started again {restarts} times (MAMBA_DIST_MAX_RESTARTS)"
    if in_vain >= bounds.in_vain:
        return (
            f"the last {in_vain} starts made no new checkpoint (MAMBA_DIST_MAX_IN_VAIN); see what "
            "ended them, or whether the time limit leaves time for a checkpoint"
        )
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    code: int = arguments.code
    try:
        words = arguments_parser().parse_args(arguments.words)
        config = load_config(words.config, words.overrides).config
        assert config.training.run_dir is not None, "set by loading a file"
        job = _Job(
            arguments.job,
            start=arguments.restarts + 1,
            bounds=Bounds(arguments.max_restarts, arguments.max_in_vain),
            run_dir=Path(config.training.run_dir),
        )
        if arguments.when == "began":
            for line in changed_versions(Path(words.config).parent):
                print(f"warning: {line}", file=sys.stderr)
            job.begin()
        elif arguments.when == "terminated":
            job.be_terminated()
        else:
            job.end(code)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return code or error.exit_code
    return code


class _Job:
    def __init__(self, job: str, *, start: int, bounds: Bounds, run_dir: Path) -> None:
        self._job = job
        self._start = start
        self._bounds = bounds
        self._run_dir = run_dir

    def begin(self) -> None:
        # SLURM starts it again by itself too, without asking.
        if self._start - 1 > self._bounds.restarts:
            raise TrainingError(
                f"start {self._start} of job {self._job}: it may be started again "
                f"{self._bounds.restarts} times (MAMBA_DIST_MAX_RESTARTS); submit anew to go on"
            )
        newest = self._note("began").checkpoint
        found = "no checkpoint yet" if newest is None else f"newest checkpoint of step {newest}"
        print(f"{self._run_dir}: {found}", flush=True)

    def end(self, code: int) -> None:
        if code == 0:
            self._note("ended", code, "finished")
            return
        what = _in_words(code)
        state = job_state(self._job)
        if not state.running:
            decision = "SLURM ended the job, and starts it again or not"
            self._note("ended by SLURM", code, decision)
            print(f"{what}; {decision}", flush=True)
            return
        self._start_again_or_not("ended", code, what, state)

    def be_terminated(self) -> None:
        state = job_state(self._job)
        if state.out_of_time:
            self._start_again_or_not("out of time", None, "the ranks had not left in time", state)

    def _start_again_or_not(
        self, event: What, code: int | None, what: str, state: JobState
    ) -> None:
        reason = why_not_again(
            code,
            state=state,
            restarts=self._start - 1,
            in_vain=starts_in_vain(
                [*read_events(self._run_dir, self._job), self._event(event, code, "")]
            ),
            bounds=self._bounds,
        )
        if reason is not None:
            self._note(event, code, f"not started again: {reason}")
            print(f"{what}; not started again: {reason}", file=sys.stderr)
            kept = "" if code in _WOULD_HAPPEN_AGAIN else "; the newest checkpoint is kept"
            print(f"to go on, submit anew{kept}", flush=True)
            return
        self._note(event, code, "requeued")
        print(f"{what}; requeued, start {self._start + 1} follows", flush=True)
        requeue(self._job)

    def _event(self, event: What, code: int | None, decision: str) -> Event:
        steps = committed_steps(self._run_dir)
        with suppress(CheckpointError):
            # The next start commits them.
            steps = sorted({*steps, *written_steps(self._run_dir)})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        newest = steps[-1] if steps else None
        return Event(self._job, self._start, event, newest, now, code, decision)

    def _note(self, what: What, code: int | None = None, decision: str = "") -> Event:
        """Without it a job would start again for ever, so a disk that refuses it ends the job."""
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            event = self._event(what, code, decision)
            with (self._run_dir / RECORD).open("ab+") as file:
                # Behind a line that a kill cut, this one would be lost with it.
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                is_cut = file.read(1) not in (b"", b"\n")
                file.write(b"\n" * is_cut + json.dumps(asdict(event)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(
                f"{self._run_dir}: cannot be written ({error.strerror}), so starts cannot be "
                "counted, and the job does not start again"
            ) from error
        return event


def read_events(run_dir: Path, job: str) -> list[Event]:
    """What was noted of a job, oldest first; a line that a kill or a disk spoilt is left out.

    Raises:
        TrainingError: the file is there and cannot be read.
    """
    path = run_dir / RECORD
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror}), so starts cannot be counted, and the job "
            "does not start again"
        ) from error
    found = map(_event_of, lines)
    return [event for event in found if event is not None and event.job == job]


def _event_of(line: bytes) -> Event | None:
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return event if isinstance(event.checkpoint, int | None) else None


def _in_words(code: int) -> str:
    if code == EXIT_STOPPED:
        return "the ranks were told to stop, hung, or lacked what may come back (exit code 75)"
    if code > _BY_SIGNAL:
        return f"a rank was ended by signal {code - _BY_SIGNAL} (exit code {code})"
    return f"the ranks ended with exit code {code}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba_dist.commands.restarts",
        description="Note a start of a training job or its end, and put it back into the queue.",
    )
    parser.add_argument("when", choices=("began", "terminated", "ended"))
    parser.add_argument("--job", required=True, help="SLURM_JOB_ID")
    parser.add_argument("--restarts", type=int, required=True, help="SLURM_RESTART_COUNT")
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--max-in-vain", type=int, required=True)
    parser.add_argument("--code", type=int, default=0, help="what the ranks ended with")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="those of launch/train.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
