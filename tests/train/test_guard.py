"""Dropped steps are named, and a row of them is told to whoever can go back."""

import logging
import math

import pytest

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.config.schema import TrainingConfig
from mamba_dist.engine.base import DROP, StepStats
from mamba_dist.train.guard import BadRow, SkipGuard

NAN = float("nan")


class Ranks:
    """Rank 0 of two, the other having the loss sum `other`."""

    rank = 0

    def __init__(self, other: float) -> None:
        self.other = other
        self.asked = 0

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        self.asked += 1
        return [value + self.other for value in values]


def progress(step: int) -> Progress:
    return Progress(
        step=step, next_sample=0, trained_tokens=0, global_batch_size=8, data_fingerprint=""
    )


def guard(limit: int, *, other: float = 1.0, **training: object) -> SkipGuard:
    fields = {"max_steps": 2000, "global_batch_size": 32, "max_skipped_steps": limit, **training}
    return SkipGuard(TrainingConfig.model_validate(fields), world=Ranks(other))  # type: ignore[arg-type]


def observe(
    one: SkipGuard, step: int, *, skipped: bool, grad_norm: float = NAN, loss: float = 2.5
) -> BadRow | None:
    return one.observe(
        progress(step),
        loss=loss,
        stats=StepStats(grad_norm, skipped),
        samples=range(8 * step, 8 * step + 8),
    )


@pytest.fixture
def lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    # A run started in this process may have taken the package's log lines for itself.
    monkeypatch.setattr(logging.getLogger("mamba_dist"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_dropped_step_is_logged_with_its_norm_its_limit_and_its_samples(
    lines: pytest.LogCaptureFixture,
) -> None:
    one = guard(3, skip_grad_norm_above=100)
    assert one.skip_above(progress(4), lambda: 1.0, 10) == 100
    observe(one, 5, skipped=True, grad_norm=123.5)
    assert lines.messages == [
        "step 5 skipped on all ranks: loss 2.5, gradient norm 123.5 above 100; samples 40 to 47"
    ]


def test_an_applied_step_is_not_worth_a_line(lines: pytest.LogCaptureFixture) -> None:
    assert observe(guard(1), 5, skipped=False, grad_norm=1e9) is None
    assert not lines.messages


def test_the_row_that_is_too_long_is_told_with_its_steps_and_samples() -> None:
    one = guard(3)
    assert observe(one, 7, skipped=True) is None
    assert observe(one, 8, skipped=True) is None
    row = observe(one, 9, skipped=True)
    assert row is not None
    # Counted from 0: the third row of the log is step 9, before which 8 were taken.
    assert (row.steps, row.samples) == (range(6, 9), range(56, 80))
    assert str(row).startswith("3 steps in a row were skipped, the last one 9 with gradient norm")
    assert observe(one, 7, skipped=True) is None, "the count begins again"


def test_an_applied_step_in_between_starts_the_count_afresh() -> None:
    one = guard(2)
    for step in range(0, 20, 2):
        assert observe(one, step + 1, skipped=True) is None
        assert observe(one, step + 2, skipped=False) is None
    assert observe(one, 21, skipped=True) is None
    assert observe(one, 22, skipped=True) is not None


def test_a_limit_of_one_tolerates_no_dropped_step() -> None:
    assert observe(guard(1), 1, skipped=True) is not None


def test_a_loss_is_reduced_before_the_step_only_to_look_for_spikes() -> None:
    ranks = Ranks(0.0)
    fields = {"max_steps": 2000, "global_batch_size": 32}
    plain = SkipGuard(TrainingConfig.model_validate(fields), world=ranks)  # type: ignore[arg-type]
    assert plain.skip_above(progress(4), lambda: math.nan, 10) == math.inf
    assert ranks.asked == 0


@pytest.mark.parametrize(
    ("own", "other", "dropped"),
    [(10.0, 10.0, False), (10.0, 110.0, True), (math.nan, 1.0, True), (1.0, math.inf, True)],
)
def test_a_spike_of_the_loss_on_any_rank_drops_the_step_whatever_its_gradient(
    own: float, other: float, dropped: bool
) -> None:
    one = guard(3, other=other, spike_sigmas=6, spike_window_steps=4)
    now = progress(4)
    for loss, norm in ((1.9, 1.0), (2.1, 1.2), (2.0, 1.1)):
        now = one.noted(now, loss=loss, stats=StepStats(norm, skipped=False))
    now = one.noted(now, loss=50.0, stats=StepStats(1.0, skipped=True))
    assert now.recent_losses == (1.9, 2.1, 2.0), "a dropped step is no measure"
    limit = one.skip_above(now, lambda: own, 10)
    assert limit == DROP if dropped else 1.2 < limit < 2
