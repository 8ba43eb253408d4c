"""The order of microbatches of one rank, and processes that read them ahead.

step = optimizer step; microstep = one forward-backward of this rank, counted over the whole run;
position = sample of the run, over all ranks (see segments.py). Rank r reads the r-th slice of the
positions of a step, so the samples of a step are the same for any world.
"""

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_dist.data.batch import PackedRows, SampleId, pack
from mamba_dist.data.dataset import check_sizes, open_dataset
from mamba_dist.data.samples import Samples, training_samples
from mamba_dist.data.segments import RunOrder
from mamba_dist.data.workers import Worker, WorkerFailure, start_workers, stop_workers
from mamba_dist.errors import DataError

if TYPE_CHECKING:
    from mamba_dist.config.schema import Packing


@dataclass(frozen=True)
class MicrostepPlan:
    """Which samples each microstep of one rank reads."""

    order: RunOrder
    micro_batch_size: int
    accumulation_steps: int
    rank: int

    def samples(self, microstep: int) -> tuple[SampleId, ...]:
        """The samples that a microstep reads, in row order."""
        step, micro = divmod(microstep, self.accumulation_steps)
        first = (self.rank * self.accumulation_steps + micro) * self.micro_batch_size
        positions = self.order.positions(step)[first : first + self.micro_batch_size]
        located = [self.order.locate(position) for position in positions]
        return tuple(SampleId(sample.source, sample.number) for sample in located)


@dataclass(frozen=True)
class PrefetchJob:
    """What a loader process needs; it reads every `stride`-th microstep from `first` on.

    `paths` and `fingerprints` are those of the mixture's sources, in its order.
    """

    paths: tuple[Path, ...]
    fingerprints: tuple[str, ...]
    plan: MicrostepPlan
    packing: "Packing"
    sequence_length: int
    pad_token_id: int
    first: int
    stride: int
    end: int | None


def read_here(sources: Sequence[Samples], job: PrefetchJob) -> Generator[PackedRows]:
    """The microbatches of a job, read when asked for."""
    for microstep in _microsteps(job):
        yield pack(sources, job.plan.samples(microstep), pad_token_id=job.pad_token_id)


def read_ahead(jobs: list[PrefetchJob]) -> Generator[PackedRows]:
    """The microbatches of jobs that take turns (strides and beginnings interleave), from a process
    each.

    A process works ahead by at least one microbatch: as far as its pipe holds them.

    Raises:
        DataError: the data set is damaged or was replaced, or a process died or cannot be started.
    """
    try:
        workers = start_workers(_prefetch, jobs)
    except OSError as error:
        raise DataError(
            f"the {len(jobs)} loader processes of this rank cannot be started "
            f"({error.strerror or error}); lower data.num_workers, or raise the limits of "
            "processes and files (ulimit -u, -n)"
        ) from error
    try:
        for turn, _ in enumerate(_microsteps(jobs[0], stride=1)):
            yield _take(workers[turn % len(workers)], jobs[0].paths)
    finally:
        stop_workers(workers)


def _microsteps(job: PrefetchJob, stride: int | None = None) -> Iterator[int]:
    stride = stride or job.stride
    return iter(count(job.first, stride) if job.end is None else range(job.first, job.end, stride))


def _take(worker: Worker, folders: Sequence[Path]) -> PackedRows:
    try:
        answer = worker.connection.recv()
    except (EOFError, OSError) as error:
        died = f"a loader process died ({worker.describe_end()})"
        if worker.end_signal() == signal.SIGBUS:
            # What the kernel sends for a page of a map that its file no longer has or cannot give.
            raise DataError(f"{died}: {_unreadable_shard(folders)}") from error
        raise DataError(
            f"{died}; start the run again to resume, with fewer data.num_workers if memory is short"
        ) from error
    if isinstance(answer, WorkerFailure):
        raise DataError(answer.message)
    assert isinstance(answer, PackedRows)
    return answer


def _unreadable_shard(folders: Sequence[Path]) -> str:
    for folder in folders:
        try:
            check_sizes(folder)
        except DataError as error:
            return str(error)
    return (
        f"a shard of {' or '.join(map(str, folders))} could not be read, though all have their "
        "size; check the disk, and the shards by `python tools/verify_shards.py FOLDER`"
    )


def _prefetch(connection: Connection, job: PrefetchJob) -> None:
    try:
        datasets = [open_dataset(path) for path in job.paths]
        for dataset, fingerprint in zip(datasets, job.fingerprints, strict=True):
            if dataset.fingerprint != fingerprint:
                raise DataError(
                    f"{dataset.path} was replaced while it was read; start the run again"
                )
        sources = [
            training_samples(dataset, packing=job.packing, length=job.sequence_length)
            for dataset in datasets
        ]
        for rows in read_here(sources, job):
            connection.send(rows)
    except DataError as error:
        connection.send(WorkerFailure(str(error)))
    except ConnectionError:
        return  # nobody wants more
