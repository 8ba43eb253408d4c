"""A loader that falls behind says so, once, and once that it keeps up again."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.commands.bench_read.sets import make_set
from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import DataConfig
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.loader import TrainLoader
from mamba_dist.data.training_sources import TrainingSource, new_run
from mamba_dist.engine.base import StepStats
from mamba_dist.telemetry.metrics import Metrics
from mamba_dist.train.lag import LoaderLag
from mamba_dist.train.meter import Meter


class Heard(logging.Handler):
    """Keeps the lines of one logger, whatever others do with the package's."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.WARNING
        self.lines.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    logger = logging.getLogger("mamba_dist.train.lag")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def observe(shares: list[float]) -> None:
    lag = LoaderLag(workers=3)
    for number, share in enumerate(shares, 1):
        lag.observe(10 * number, wait_s=share * 2.0, step_s=2.0)


def test_a_loader_behind_for_long_is_told_once_with_share_and_cure(heard: Heard) -> None:
    observe([0.0, 0.25, 0.5, 0.25, 0.04, 0.25])
    [line] = heard.lines
    assert "the last steps up to 20 waited 25 % of their time for data (0.5 s of 2 s)" in line
    assert "raise data.num_workers (now 3)" in line


def test_the_end_of_a_lag_is_told_after_some_calm_and_a_new_lag_is_told_anew(heard: Heard) -> None:
    observe([0.0, 0.2, 0.01, 0.01, 0.2, 0.01, 0.01, 0.01, 0.01, 0.3])
    assert [line.split(":")[0] for line in heard.lines] == [
        "the loader falls behind",
        "the loader keeps up again at step 80",
        "the loader falls behind",
    ]


def test_neither_the_start_of_the_loader_nor_short_waits_are_told(heard: Heard) -> None:
    observe([0.9, 0.05, 0.04, 0.0])
    assert not heard.lines


def test_a_loader_process_that_stands_still_is_noticed(tmp_path: Path, heard: Heard) -> None:
    make_set(tmp_path, 400_000)
    # A batch of 650 kB, more than fits into the pipe: none waits there ready.
    config = DataConfig(sequence_length=4096, num_workers=1, dataset_path=str(tmp_path))
    loader = TrainLoader(
        new_run((TrainingSource(open_dataset(tmp_path), 1.0, None),), config, global_batch_size=8),
        config,
        plan=BatchPlan(8, 1, 8),
        rank=0,
        world_size=1,
        end_step=9,
    )
    meter = Meter(
        Metrics([]),
        log_steps=2,
        world_size=1,
        flops_per_token=1.0,
        advance_to=lambda step: None,
        step_positions=8 * 4096,
        loader_workers=1,
    )
    steps = iter(loader)
    already = set(active_children())
    for number in range(1, 9):
        if number == 4:
            [process] = set(active_children()) - already
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (process.pid, signal.SIGCONT)).start()
        batches, fault = meter.next_batches(steps)
        assert fault is None
        assert np.prod(batches[0].input_ids.shape) == 8 * 4096
        time.sleep(0.02)
        meter.observe(
            Progress(
                step=number,
                next_sample=8 * number,
                trained_tokens=0,
                global_batch_size=8,
                data_fingerprint="d",
            ),
            loss_sum=1.0,
            tokens=1,
            lr=1e-3,
            stats=StepStats(grad_norm=1.0, skipped=False),
        )
    assert any(line.startswith("the loader falls behind") for line in heard.lines)
