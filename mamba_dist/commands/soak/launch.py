"""One real launch of the soaked run, with a folder of its own for what it says and leaves."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mamba_dist.commands.soak.made_run import GLOBAL_BATCH
from mamba_dist.commands.soak.plan import Launcher
from mamba_dist.commands.soak.processes import (
    RANK_MODULE,
    kill_all,
    processes_with,
    ranks_with,
    send,
)

_BIN: Final = Path(sys.executable).parent
# What a launcher of ours may have left in the environment.
_UNSET: Final = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_ID"),
    *("CROSS_RANK", "TORCHELASTIC_RUN_ID"),
)
_POLL_S: Final = 0.001


@dataclass(frozen=True)
class Spread:
    """How a launch spreads the run."""

    launcher: Launcher
    ranks: int
    engine: str
    loaders: int = 0
    accumulates: bool = False
    hang_timeout_s: float | None = None

    def overrides(self) -> list[str]:
        """The fields of the config that say so."""
        kind, _, stage = self.engine.partition("-")
        share = GLOBAL_BATCH // self.ranks
        # The fewest micro-batches that share it evenly.
        parts = next(n for n in range(2, share + 1) if share % n == 0) if self.accumulates else 1
        fields = {
            "engine.kind": kind if stage == "" else "zero",
            "engine.zero_stage": stage or "null",
            "training.micro_batch_size": str(share // parts),
            "data.num_workers": str(self.loaders),
        }
        if self.hang_timeout_s is not None:
            fields["engine.hang_timeout_minutes"] = str(self.hang_timeout_s / 60)
            # Nothing is expected of a rank within a save, so none must be stopped there.
            fields["checkpoint.save_steps"] = "1000000"
        return [f"{name}={value}" for name, value in fields.items()]


class Launch:
    """A launch that was begun: how far it is, and its end."""

    def __init__(self, folder: Path, config: Path, spread: Spread, *, pace_s: float = 0.0) -> None:
        """Begins it; `folder` is made, `pace_s` is what each step takes at least."""
        self.folder = folder
        self.spread = spread
        self.temporary = folder / "tmp"
        self.trained = folder / "trained"
        for one in (self.temporary, self.trained):
            one.mkdir(parents=True)
        self._marker = f"TMPDIR={self.temporary}"
        self._log = folder / "log"
        own = ["--trained", str(self.trained), "--pace", str(pace_s), "--config", str(config)]
        command = [*_command(spread), *own, *spread.overrides()]
        unset = [word for name in _UNSET for word in ("-u", name)]
        self.began_at = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["env", *unset, "OMP_NUM_THREADS=1", self._marker, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C at the soak's terminal is not one of its events.
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the command, the launcher or the only rank, has ended."""
        return self.process.poll() is not None

    @property
    def marker(self) -> str:
        """What stands in the environment of all its processes."""
        return self._marker

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        return ranks_with(self._marker)

    def all(self) -> list[int]:
        """Process ids of ranks, launchers and loaders."""
        return list(processes_with(self._marker))

    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace")

    def last_step(self) -> int | None:
        """The last step that a first rank has finished, None before that."""
        files = list(self.trained.glob("rank-0-of-*.jsonl"))
        lines = files[0].read_bytes().splitlines(keepends=True) if files else []
        whole = [line for line in lines if line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"]) if whole else None

    def steps_done(self) -> int:
        """Steps that its first rank has finished."""
        files = list(self.trained.glob("rank-0-of-*.jsonl"))
        return files[0].read_bytes().count(b"\n") if files else 0

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Whether the condition came true before the launch ended or the time was over."""
        deadline = time.monotonic() + timeout_s
        while not (met := condition()) and not self.ended and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return met

    def wait(self, *, timeout_s: float) -> int | None:
        """The exit code, or None if it has not ended in time."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Ends whatever is left of it."""
        send([self.process.pid] if not self.ended else [], signal.SIGKILL)
        kill_all(self._marker)
        self.process.wait()


def _command(spread: Spread) -> Sequence[str]:
    count, port = str(spread.ranks), str(_free_port())
    if spread.launcher == "torchrun":
        launcher = [str(_BIN / "torchrun"), "--nproc_per_node", count, "--master_port", port]
        return [*launcher, "-m", RANK_MODULE]
    if spread.launcher == "deepspeed":
        launcher = [str(_BIN / "deepspeed"), "--num_gpus", count, "--master_port", port]
        return [*launcher, "--module", RANK_MODULE]
    return [sys.executable, "-m", RANK_MODULE]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
