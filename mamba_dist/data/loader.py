"""Batches for training and validation. Rank and world size arrive as ints; nothing here
communicates.

G global batch, B micro batch, L sequence length.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice

import torch

from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import DataConfig
from mamba_dist.data.batch import NO_SAMPLE, Batch, PackedRows, pack
from mamba_dist.data.dataset import TokenDataset
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.prefetch import MicrostepPlan, PrefetchJob, read_ahead, read_here
from mamba_dist.data.samples import training_samples, validation_samples


class TrainLoader:
    """Yields, for every optimizer step from `start_step` on, the list of this rank's microbatches.

    The samples of a step depend on the data set, the seed and G alone: not on the world size, the
    number of workers, the accumulation, or where a run was resumed. Ends before `end_step`, or
    never.
    """

    def __init__(
        self,
        dataset: TokenDataset,
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
        self._samples = training_samples(
            dataset, packing=config.packing, length=config.sequence_length
        )
        self._workers = config.num_workers
        self._accumulation_steps = plan.accumulation_steps
        self._global_batch_size = plan.global_batch_size
        self.total_windows = len(self._samples)
        order = SampleOrder(self.total_windows, config.seed, config.shuffle)
        self._job = PrefetchJob(
            path=dataset.path,
            fingerprint=dataset.fingerprint,
            plan=MicrostepPlan(
                order, plan.micro_batch_size, plan.accumulation_steps, plan.global_batch_size, rank
            ),
            packing=config.packing,
            sequence_length=config.sequence_length,
            pad_token_id=pad_token_id,
            first=start_step * plan.accumulation_steps,
            stride=1,
            end=None if end_step is None else end_step * plan.accumulation_steps,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every window of the training split is read, rounded up."""
        return -(-self.total_windows // self._global_batch_size)

    def sample_ids(self, step: int) -> tuple[int, ...]:
        """The windows that this rank reads in an optimizer step; nothing is read."""
        first = step * self._accumulation_steps
        microsteps = range(first, first + self._accumulation_steps)
        return tuple(window for m in microsteps for window in self._job.plan.windows(m))

    def __iter__(self) -> Iterator[list[Batch]]:
        rows = self._rows()
        while True:
            step = [_to_torch(one) for one in islice(rows, self._accumulation_steps)]
            if not step:
                return
            yield step

    def _rows(self) -> Iterator[PackedRows]:
        if self._workers == 0:
            return read_here(self._samples, self._job)
        first = self._job.first
        return read_ahead(
            [
                replace(self._job, first=first + i, stride=self._workers)
                for i in range(self._workers)
            ]
        )


class ValidationLoader:
    """Yields this rank's validation microbatches, equally many on every rank.

    At most `max_sequences` windows over all ranks, spread evenly over the split and the same each
    time. Rows that fill up the last batches have no labels and the sample id NO_SAMPLE.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        config: DataConfig,
        *,
        micro_batch_size: int,
        max_sequences: int,
        rank: int,
        world_size: int,
        pad_token_id: int = 0,
    ) -> None:
        self._samples = validation_samples(dataset, config.sequence_length)
        self._pad_token_id = pad_token_id
        self._micro_batch_size = micro_batch_size
        self.total_windows = len(self._samples)
        self._rank = rank
        self._world_size = world_size
        self._max_sequences = max_sequences

    def __len__(self) -> int:
        return -(-len(self._windows) // (self._micro_batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        rows_per_batch = self._micro_batch_size * self._world_size
        for index in range(len(self)):
            first = index * rows_per_batch + self._rank * self._micro_batch_size
            windows = self._windows[first : first + self._micro_batch_size]
            filled = [*windows, *[NO_SAMPLE] * (self._micro_batch_size - len(windows))]
            yield _to_torch(pack(self._samples, filled, pad_token_id=self._pad_token_id))

    @cached_property
    def _windows(self) -> list[int]:
        chosen = min(self._max_sequences, self.total_windows)
        return [index * self.total_windows // chosen for index in range(chosen)]


def _to_torch(rows: PackedRows) -> Batch:
    return Batch(
        input_ids=torch.from_numpy(rows.input_ids),
        labels=torch.from_numpy(rows.labels),
        seq_idx=torch.from_numpy(rows.seq_idx),
        sample_ids=rows.sample_ids,
    )
