"""A benchmark's worker: builds one job, then does as many steps as its parent asks for.

Runs as `python -m mamba_dist.commands.bench.worker`. Pickled messages on stdin and stdout: first
the spec and the number of threads, then a method's name and arguments; each is answered by a flag
for success and a value or a message. The end of stdin is the end of the worker.
"""

import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mamba_dist.commands.bench.ops import OpJob, build_op
from mamba_dist.commands.bench.spec import Job, NotMeasuredError, OpSpec, Outcome, Spec, TrainSpec
from mamba_dist.commands.bench.train import TrainJob, build_model
from mamba_dist.errors import MambaDistError

_PEERS_INSTALL = "pip install mambapy transformers"


class JobRunner:
    """A `Worker` in this process."""

    def __init__(
        self, make_job: Callable[[], Job], *, warm_up: Callable[[], Job], threads: int
    ) -> None:
        self._make_job = make_job
        self._warm_up = warm_up
        self._threads = threads
        self._bytes_before = 0
        self._job: Job

    @property
    def pid(self) -> int:
        return os.getpid()

    def start(self) -> float:
        torch.set_num_threads(self._threads)
        try:
            # What is imported, compiled and loaded once is no memory of the job.
            self._warm_up().step()
            # 5 sets the high-water mark back to what is resident now, see proc(5).
            Path("/proc/self/clear_refs").write_text("5")
            self._bytes_before = _high_water_bytes()
            self._job = self._make_job()
            return self.steps(1)[0]
        except MambaDistError as error:
            raise NotMeasuredError(str(error)) from error

    def steps(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            self._job.step()
            seconds.append(time.perf_counter() - begun)
        return seconds

    def finish(self) -> Outcome:
        peak_bytes = _high_water_bytes() - self._bytes_before
        return Outcome(peak_bytes, self._job.errors(), self._job.allowed)

    def close(self) -> None:
        """Nothing to end."""


def make_job(spec: Spec) -> Job:
    """The job of a spec; the peers' packages are imported only for a variant that needs them.

    Raises:
        NotMeasuredError: the variant cannot run here.
    """
    try:
        if isinstance(spec, OpSpec):
            return OpJob(spec, _op(spec))
        return TrainJob(spec, _model(spec))
    except ImportError as error:
        raise NotMeasuredError(f"{error}; {_PEERS_INSTALL}") from error


def _op(spec: OpSpec) -> Callable[..., torch.Tensor]:
    if spec.variant == "mambapy":
        from mamba_dist.commands.bench.peers_mambapy import selective_scan

        return selective_scan
    if spec.variant == "hf":
        from mamba_dist.commands.bench.peers_huggingface import chunk_scan

        return chunk_scan(spec.case.sizes["Q"])
    return build_op(spec)


def _model(spec: TrainSpec) -> torch.nn.Module:
    if spec.variant == "mambapy":
        from mamba_dist.commands.bench.peers_mambapy import mambapy_model

        return mambapy_model(spec.config)
    if spec.variant.startswith("hf"):
        from mamba_dist.commands.bench.peers_huggingface import huggingface_model

        return huggingface_model(spec.config, use_mambapy=spec.variant == "hf-scan")
    return build_model(spec)


def _high_water_bytes() -> int:
    """The most memory that this process has ever had resident since the mark was set back."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _serve() -> None:
    # Packages print what they like; the parent must get messages only.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands = sys.stdin.buffer
    spec, threads = pickle.load(commands)
    runner = JobRunner(
        lambda: make_job(spec), warm_up=lambda: make_job(spec.tiny()), threads=threads
    )
    while True:
        try:
            method, arguments = pickle.load(commands)
        except EOFError:
            return
        try:
            reply = (True, getattr(runner, method)(*arguments))
        except NotMeasuredError as error:
            reply = (False, str(error))
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    _serve()
