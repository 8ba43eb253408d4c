"""Dropped steps are named, and a row of them ends the run."""

import logging

import pytest

from mamba_dist.errors import TrainingError
from mamba_dist.train.guard import SkipGuard

NAN = float("nan")


def observe(guard: SkipGuard, step: int, *, skipped: bool, grad_norm: float = NAN) -> None:
    guard.observe(
        step=step, skipped=skipped, grad_norm=grad_norm, samples=range(8 * step, 8 * step + 8)
    )


def test_a_dropped_step_is_logged_with_its_norm_and_its_samples(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run started in this process may have taken the package's log lines for itself.
    monkeypatch.setattr(logging.getLogger("mamba_dist"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        observe(SkipGuard(3), 5, skipped=True, grad_norm=123.5)
    [line] = caplog.messages
    assert line == "step 5 skipped on all ranks: gradient norm 123.5; samples 40 to 47"


def test_an_applied_step_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    observe(SkipGuard(1), 5, skipped=False, grad_norm=1e9)
    assert not caplog.messages


def test_the_row_that_is_too_long_ends_the_run_and_names_the_samples() -> None:
    guard = SkipGuard(3)
    observe(guard, 1, skipped=True)
    observe(guard, 2, skipped=True)
    with pytest.raises(TrainingError, match=r"3 steps in a row .* 24 to 31"):
        observe(guard, 3, skipped=True)


def test_an_applied_step_in_between_starts_the_count_afresh() -> None:
    guard = SkipGuard(2)
    for step in range(0, 20, 2):
        observe(guard, step, skipped=True)
        observe(guard, step + 1, skipped=False)
    observe(guard, 20, skipped=True)
    with pytest.raises(TrainingError):
        observe(guard, 21, skipped=True)


def test_a_limit_of_one_tolerates_no_dropped_step() -> None:
    with pytest.raises(TrainingError):
        observe(SkipGuard(1), 1, skipped=True)
