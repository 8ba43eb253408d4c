"""The order of microbatches of one rank, and processes that read them ahead.

step = optimizer step; microstep = one forward-backward of this rank, counted over the whole run;
position = sample of the run, over all ranks (see order.py). With G samples a step, rank r reads the
r-th slice of positions s·G … (s+1)·G - 1, so the samples of a step are the same for any world.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_dist.data.batch import PackedRows, pack
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.samples import Samples, training_samples
from mamba_dist.data.workers import Worker, WorkerFailure, start_workers, stop_workers
from mamba_dist.errors import DataError

if TYPE_CHECKING:
    from mamba_dist.config.schema import Packing


@dataclass(frozen=True)
class MicrostepPlan:
    """Which samples each microstep of one rank reads."""

    order: SampleOrder
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    rank: int

    def windows(self, microstep: int) -> tuple[int, ...]:
        """The windows of the training split that a microstep reads, in row order."""
        step, micro = divmod(microstep, self.accumulation_steps)
        slice_begins = step * self.global_batch_size + (
            self.rank * self.micro_batch_size * self.accumulation_steps
        )
        first = slice_begins + micro * self.micro_batch_size
        positions = range(first, first + self.micro_batch_size)
        return tuple(self.order.locate(position)[1] for position in positions)


@dataclass(frozen=True)
class PrefetchJob:
    """What a loader process needs; it reads every `stride`-th microstep from `first` on."""

    path: Path
    fingerprint: str
    plan: MicrostepPlan
    packing: "Packing"
    sequence_length: int
    pad_token_id: int
    first: int
    stride: int
    end: int | None


def read_here(samples: Samples, job: PrefetchJob) -> Iterator[PackedRows]:
    """The microbatches of a job, read when asked for."""
    for microstep in _microsteps(job):
        yield pack(samples, job.plan.windows(microstep), pad_token_id=job.pad_token_id)


def read_ahead(jobs: list[PrefetchJob]) -> Iterator[PackedRows]:
    """The microbatches of jobs that take turns (strides and beginnings interleave), from a process
    each.

    A process works ahead by at least one microbatch: as far as its pipe holds them.

    Raises:
        DataError: the data set is damaged or was replaced, or a process died.
    """
    workers = start_workers(_prefetch, jobs)
    try:
        for turn, _ in enumerate(_microsteps(jobs[0], stride=1)):
            yield _take(workers[turn % len(workers)])
    finally:
        stop_workers(workers)


def _microsteps(job: PrefetchJob, stride: int | None = None) -> Iterator[int]:
    stride = stride or job.stride
    return iter(count(job.first, stride) if job.end is None else range(job.first, job.end, stride))


def _take(worker: Worker) -> PackedRows:
    try:
        answer = worker.connection.recv()
    except (EOFError, OSError) as error:
        raise DataError(
            f"a loader process died ({worker.describe_end()}); start the run again to resume, with "
            "fewer data.num_workers if memory is short"
        ) from error
    if isinstance(answer, WorkerFailure):
        raise DataError(answer.message)
    assert isinstance(answer, PackedRows)
    return answer


def _prefetch(connection: Connection, job: PrefetchJob) -> None:
    try:
        dataset = open_dataset(job.path)
        if dataset.fingerprint != job.fingerprint:
            raise DataError(f"{job.path} was replaced while it was read; start the run again")
        samples = training_samples(dataset, packing=job.packing, length=job.sequence_length)
        for rows in read_here(samples, job):
            connection.send(rows)
    except DataError as error:
        connection.send(WorkerFailure(str(error)))
    except ConnectionError:
        return  # nobody wants more
