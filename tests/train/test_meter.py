"""What stands in a training record: sums over its own stretch, and the time of steps alone."""

import math
import time

import pytest

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.engine.base import StepStats
from mamba_dist.telemetry.metrics import Metrics, Record, TrainRecord
from mamba_dist.train.meter import Meter


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[TrainRecord] = []

    def write(self, record: Record) -> None:
        assert isinstance(record, TrainRecord)
        self.records.append(record)

    def close(self) -> None:
        pass


class Setting:
    """A meter, what it wrote, where it moved the bar to, and a way to make a step."""

    def __init__(self, *, log_steps: int, world_size: int = 1) -> None:
        self.sink = Kept()
        self.bar: list[int] = []
        self.meter = Meter(
            Metrics([self.sink]),
            log_steps=log_steps,
            world_size=world_size,
            step_positions=20,
            flops_per_token=3e9,
            advance_to=self.bar.append,
            loader_workers=1,
        )
        self._trained = 0

    def step(
        self,
        number: int,
        *,
        loss_sum: float,
        tokens: int,
        skipped: bool = False,
        grad_norm: float = 1.0,
        wait_s: float = 0.0,
        work_s: float = 0.001,
    ) -> None:
        def slow():
            time.sleep(wait_s)
            yield []

        self.meter.next_batches(slow())
        time.sleep(work_s)
        self._trained += 0 if skipped else tokens
        self.meter.observe(
            self.progress(number),
            loss_sum=loss_sum,
            tokens=tokens,
            lr=1e-3 * number,
            stats=StepStats(grad_norm=grad_norm, skipped=skipped),
        )

    def progress(self, step: int) -> Progress:
        return Progress(
            step=step,
            next_sample=step * 4,
            trained_tokens=self._trained,
            global_batch_size=4,
            data_fingerprint="d",
        )


def test_a_record_comes_every_log_steps_and_averages_its_own_stretch_by_token() -> None:
    setting = Setting(log_steps=2)
    for number, (loss_sum, tokens) in enumerate([(30.0, 10), (10.0, 10), (8.0, 2), (6.0, 5)], 1):
        setting.step(number, loss_sum=loss_sum, tokens=tokens)
    first, second = setting.sink.records
    assert (first.step, first.loss, first.tokens) == (2, 2.0, 20)
    assert (second.step, second.loss, second.tokens) == (4, 2.0, 27)
    # Of the 20 positions of a step.
    assert (first.unlabelled_share, second.unlabelled_share) == (0.5, 1 - 7 / 40)
    assert second.learning_rate == pytest.approx(4e-3)
    assert setting.bar == [1, 2, 3, 4]


def test_a_skipped_step_does_not_spoil_the_mean_and_is_counted() -> None:
    setting = Setting(log_steps=3)
    setting.step(1, loss_sum=20.0, tokens=10)
    setting.step(2, loss_sum=math.nan, tokens=10, skipped=True, grad_norm=math.nan)
    setting.step(3, loss_sum=40.0, tokens=10, grad_norm=0.5)
    [record] = setting.sink.records
    assert record.loss == 3.0
    assert record.skipped_steps == 1
    assert record.tokens == 20
    assert record.grad_norm == 0.5


def test_a_stretch_of_skipped_steps_alone_has_no_loss_rather_than_zero() -> None:
    setting = Setting(log_steps=1)
    setting.step(1, loss_sum=math.nan, tokens=10, skipped=True, grad_norm=math.inf)
    assert math.isnan(setting.sink.records[0].loss)


def test_rates_are_over_the_time_of_steps_and_not_of_validation_or_saves_between_them() -> None:
    setting = Setting(log_steps=2, world_size=4)
    setting.step(1, loss_sum=1.0, tokens=100, work_s=0.02)
    time.sleep(0.5)  # a validation
    setting.step(2, loss_sum=1.0, tokens=100, wait_s=0.1, work_s=0.02)
    [record] = setting.sink.records
    seconds = record.step_s * 2
    assert 0.14 <= seconds < 0.5
    assert record.tokens_per_s == pytest.approx(200 / seconds)
    assert record.tokens_per_s_per_device == pytest.approx(record.tokens_per_s / 4)
    assert record.model_tflops_per_s == pytest.approx(record.tokens_per_s * 3e9 / 1e12)
    assert 0.05 <= record.data_wait_s < record.step_s
    assert record.peak_memory_gib > 0.01


def test_flushing_writes_what_is_left_and_nothing_when_nothing_is() -> None:
    setting = Setting(log_steps=10)
    setting.step(1, loss_sum=5.0, tokens=5)
    setting.meter.flush(setting.progress(1), lr=1e-3, grad_norm=2.0)
    setting.meter.flush(setting.progress(1), lr=1e-3, grad_norm=2.0)
    [record] = setting.sink.records
    assert (record.step, record.loss, record.grad_norm) == (1, 1.0, 2.0)
