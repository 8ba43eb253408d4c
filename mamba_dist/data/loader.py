"""Batches for training and validation. Rank and world size arrive as ints; nothing here
communicates.

G global batch, B micro batch, L sequence length.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import islice

import torch

from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import DataConfig
from mamba_dist.data.batch import NO_SAMPLE, Batch, PackedRows, SampleId, pack
from mamba_dist.data.mixture import Mixture
from mamba_dist.data.prefetch import MicrostepPlan, PrefetchJob, read_ahead, read_here
from mamba_dist.data.samples import training_samples, validation_samples
from mamba_dist.data.segments import exact_weight
from mamba_dist.data.training_sources import RunData, TrainingSource


class TrainLoader:
    """Yields, for every optimizer step from `start_step` on, the list of this rank's microbatches.

    The samples of a step depend on the run's segments (data sets, weights, G) and the seed alone:
    not on the world size, the number of workers, the accumulation, or where a run was resumed. Ends
    before `end_step`, or never. Steps of an earlier mixture or batch size than the last segment's
    are read by nobody.
    """

    def __init__(
        self,
        data: RunData,
        config: DataConfig,
        *,
        plan: BatchPlan,
        rank: int,
        world_size: int,
        start_step: int = 0,
        end_step: int | None = None,
        pad_token_id: int = 0,
    ) -> None:
        if plan.micro_batch_size * plan.accumulation_steps * world_size != plan.global_batch_size:
            raise ValueError(f"{plan} does not fit {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        segment = data.order.segments[-1]
        # An earlier one is the same stretch if only samples were passed over since.
        readable = all(s.reads_like(segment) for s in data.order.segments_from(start_step))
        if plan.global_batch_size != segment.global_batch_size or not readable:
            raise ValueError(f"{plan} from step {start_step} on does not fit {segment}")
        datasets = [source.dataset for source in data.sources]
        if [d.fingerprint for d in datasets] != [s.fingerprint for s in segment.sources]:
            raise ValueError(f"the open data sets are not those of {segment}")
        self._sources = [
            training_samples(dataset, packing=config.packing, length=config.sequence_length)
            for dataset in datasets
        ]
        self._workers = config.num_workers
        self._accumulation_steps = plan.accumulation_steps
        self._job = PrefetchJob(
            paths=tuple(dataset.path for dataset in datasets),
            fingerprints=tuple(dataset.fingerprint for dataset in datasets),
            plan=MicrostepPlan(data.order, plan.micro_batch_size, plan.accumulation_steps, rank),
            packing=config.packing,
            sequence_length=config.sequence_length,
            pad_token_id=pad_token_id,
            first=start_step * plan.accumulation_steps,
            stride=1,
            end=None if end_step is None else end_step * plan.accumulation_steps,
        )

    def sample_ids(self, step: int) -> tuple[SampleId, ...]:
        """The samples that this rank reads in an optimizer step; nothing is read."""
        first = step * self._accumulation_steps
        microsteps = range(first, first + self._accumulation_steps)
        return tuple(sample for m in microsteps for sample in self._job.plan.samples(m))

    def __iter__(self) -> Generator[list[Batch]]:
        """Closing it ends the loader processes."""
        with closing(self._rows()) as rows:
            while True:
                step = [_to_torch(one) for one in islice(rows, self._accumulation_steps)]
                if not step:
                    return
                yield step

    def _rows(self) -> Generator[PackedRows]:
        if self._workers == 0:
            return read_here(self._sources, self._job)
        first = self._job.first
        return read_ahead(
            [
                replace(self._job, first=first + i, stride=self._workers)
                for i in range(self._workers)
            ]
        )


class ValidationLoader:
    """Yields this rank's validation microbatches, equally many on every rank.

    At most `max_sequences` windows over all ranks, allotted to the sources by weight as far as each
    has windows, spread evenly over its split, and the same each time. Rows that fill up the last
    batches have no labels and the sample id NO_SAMPLE.
    """

    def __init__(
        self,
        sources: Sequence[TrainingSource],
        config: DataConfig,
        *,
        micro_batch_size: int,
        max_sequences: int,
        rank: int,
        world_size: int,
        pad_token_id: int = 0,
    ) -> None:
        length = config.sequence_length
        self._sources = [validation_samples(source.dataset, length) for source in sources]
        self._weights = [exact_weight(source.weight) for source in sources]
        self._pad_token_id = pad_token_id
        self._micro_batch_size = micro_batch_size
        self._available = [len(source) for source in self._sources]
        self._rank = rank
        self._world_size = world_size
        self._max_sequences = max_sequences

    def __len__(self) -> int:
        return -(-len(self._samples) // (self._micro_batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        rows_per_batch = self._micro_batch_size * self._world_size
        for index in range(len(self)):
            first = index * rows_per_batch + self._rank * self._micro_batch_size
            samples = self._samples[first : first + self._micro_batch_size]
            filled = [*samples, *[NO_SAMPLE] * (self._micro_batch_size - len(samples))]
            yield _to_torch(pack(self._sources, filled, pad_token_id=self._pad_token_id))

    @cached_property
    def _samples(self) -> list[SampleId]:
        chosen = Mixture(self._weights, self._available).counts(self._max_sequences)
        return [
            SampleId(source, index * available // count)
            for source, (count, available) in enumerate(zip(chosen, self._available, strict=True))
            for index in range(count)
        ]


def _to_torch(rows: PackedRows) -> Batch:
    return Batch(
        input_ids=torch.from_numpy(rows.input_ids),
        labels=torch.from_numpy(rows.labels),
        seq_idx=torch.from_numpy(rows.seq_idx),
        sample_ids=rows.sample_ids,
    )
