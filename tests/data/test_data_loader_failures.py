"""What a run is told when its loader processes cannot start, or end by what a disk did."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from made_data import made_documents, run_of, write_dataset

from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import DataConfig
from mamba_dist.data.batch import Batch
from mamba_dist.data.dataset import TokenDataset
from mamba_dist.data.loader import TrainLoader
from mamba_dist.errors import DataError

GLOBAL = 4
# What a process had put into its pipe before it died still comes out.
_MORE_THAN_A_PIPE_HOLDS = 5000


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_dataset(
        tmp_path, made_documents(80, seed=1), made_documents(9, seed=2), shard_bytes=10**6
    )


def steps_of(dataset: TokenDataset, *, workers: int) -> Iterator[list[Batch]]:
    config = DataConfig(sequence_length=16, num_workers=workers, seed=3)
    return iter(
        TrainLoader(
            run_of(dataset, config, global_batch_size=GLOBAL),
            config,
            plan=BatchPlan(GLOBAL, 1, GLOBAL),
            rank=0,
            world_size=1,
        )
    )


def test_a_shard_cut_short_under_the_loader_is_named(dataset: TokenDataset) -> None:
    steps = steps_of(dataset, workers=1)
    next(steps)
    shard = dataset.path / dataset.manifest.shards[0].file
    os.truncate(shard, 0)
    with pytest.raises(DataError) as caught:
        list(islice(steps, _MORE_THAN_A_PIPE_HOLDS))
    said = str(caught.value)
    assert said.startswith("a loader process died (killed by SIGBUS): ")
    assert f"shard {shard} is truncated: it has 0 bytes, the manifest says" in said


def test_a_bad_disk_under_the_loader_is_not_taken_for_a_lack_of_memory(
    dataset: TokenDataset,
) -> None:
    steps = steps_of(dataset, workers=1)
    next(steps)
    [victim] = multiprocessing.active_children()
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGBUS)
    with pytest.raises(DataError, match=r"SIGBUS\): .*verify_shards\.py") as caught:
        list(islice(steps, _MORE_THAN_A_PIPE_HOLDS))
    assert "memory" not in str(caught.value)
    assert str(dataset.path) in str(caught.value)


def test_a_machine_without_room_for_loader_processes_says_so(dataset: TokenDataset) -> None:
    steps = steps_of(dataset, workers=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        with pytest.raises(DataError, match=r"8 loader processes .*Too many open.*num_workers"):
            next(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not multiprocessing.active_children()
