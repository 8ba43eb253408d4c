"""What a start leaves for whoever asks later: each rank's log, and rank 0's lines in starts.jsonl.

Both tell how it ended, whatever ended it, but for a kill.
"""

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mamba_dist.engine.world import World, how_launched
from mamba_dist.errors import DivergedError, MambaDistError
from mamba_dist.telemetry.log import END, START, RankLog, log_file, logging_to, shortened
from mamba_dist.telemetry.starts import Reason, StartsFile
from mamba_dist.train.build import Run, package_versions
from mamba_dist.train.loop import Outcome
from mamba_dist.train.stop import EXIT_INTERRUPTED, EXIT_STOPPED, StopRequest

EXIT_CRASH = 1
"""Python's own, after a traceback."""


class StartRecord:
    """One start, as this rank records it."""

    def __init__(self, log: RankLog, starts: StartsFile | None) -> None:
        """`starts` is None on all ranks but the first."""
        self._log = log
        self._starts = starts
        self._last_step: Callable[[], int | None] = lambda: None
        self._ended = False

    def heed(self, stop: StopRequest) -> None:
        """A second SIGINT is told too, from now on."""
        stop.before_leaving = self._is_interrupted

    def train(self, run: Run) -> None:
        """The run is built, and trains from here on; what ends it is told from now on too."""
        if self._starts is not None:
            self._starts.train(first_step=run.start.step, total_steps=run.total_steps)
        self._last_step = lambda: run.watchdog.last_step
        run.watchdog.before_leaving = self._hangs

    def end(self, outcome: Outcome) -> None:
        """Training came to an end of its own, or was stopped after a checkpoint."""
        step = outcome.progress.step
        self._last_step = lambda: step
        if outcome.stopped_by is None:
            self._end("finished", "", exit_code=0)
        else:
            self._end("stopped", outcome.stopped_by, exit_code=EXIT_STOPPED)

    def fail(self, error: BaseException) -> None:
        """An error ends it."""
        if isinstance(error, MambaDistError):
            self._end(_reason_of(error), str(error), exit_code=error.exit_code)
            return
        self._log.say("ERROR", "".join(traceback.format_exception(error)).rstrip())
        # Also of an error that cannot say what it is.
        detail = "".join(traceback.format_exception_only(error)).rstrip()
        self._end("crash", detail, exit_code=EXIT_CRASH)

    def _hangs(self, stacks: str) -> None:
        self._end("hang", stacks, exit_code=EXIT_STOPPED)

    def _is_interrupted(self) -> None:
        self._end("interrupted", "a second SIGINT", exit_code=EXIT_INTERRUPTED)

    def _end(self, reason: Reason, detail: str, *, exit_code: int) -> None:
        if self._ended:
            return
        self._ended = True
        step = self._last_step()
        told = f"{reason}: {detail}" if detail else reason
        at = "" if step is None else f" after step {step}"
        self._log.say(END, f"exit code {exit_code}{at}, {told}")
        if self._starts is not None:
            self._starts.end(reason, detail=shortened(detail), exit_code=exit_code, step=step)


def _reason_of(error: MambaDistError) -> Reason:
    if isinstance(error, DivergedError):
        return "diverged"
    return "shortage" if error.exit_code == EXIT_STOPPED else "mistake"


@contextmanager
def recorded_start(run_dir: Path, *, world: World) -> Iterator[StartRecord]:
    """The record of a start in a run folder that is held, kept while the block lasts.

    All ranks call it. A rank that does not see the folder makes one, which the check of the
    environment then objects to.
    """
    host, launch, versions = socket.gethostname(), how_launched(), package_versions()
    hosts = world.texts_of_all_ranks(host)
    log = RankLog(log_file(run_dir, world.rank), native_crashes=True)
    starts = StartsFile(run_dir) if world.rank == 0 else None
    if starts is not None:
        starts.begin(
            hosts=list(dict.fromkeys(hosts)),
            ranks=world.size,
            launcher=launch.launcher,
            job=launch.job,
            versions=versions,
        )
    job = f", job {launch.job}" if launch.job else ""
    log.say(
        START,
        f"rank {world.rank} of {world.size}, host {host}, process {os.getpid()}; started by "
        f"{launch.launcher}{job}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
    )
    record = StartRecord(log, starts)
    try:
        with logging_to(log):
            yield record
    except BaseException as error:
        record.fail(error)
        raise
    finally:
        log.close()
