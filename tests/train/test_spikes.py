"""Spikes are judged by the applied steps alone, and alike after a resume."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.train.spikes import Limits, SpikeRule


def progress(losses: list[float], norms: list[float]) -> Progress:
    return Progress(
        step=len(losses),
        next_sample=0,
        trained_tokens=0,
        global_batch_size=1,
        data_fingerprint="",
        recent_losses=tuple(losses),
        recent_grad_norms=tuple(norms),
    )


def after(rule: SpikeRule, losses: list[float]) -> Progress:
    found = progress([], [])
    for loss in losses:
        found = rule.after(found, loss=loss, grad_norm=2 * loss)
    return found


@given(
    losses=st.lists(st.floats(0, 100), min_size=8, max_size=40),
    sigmas=st.floats(3, 10),
)
def test_the_limit_is_the_mean_of_the_window_and_so_many_deviations(
    losses: list[float], sigmas: float
) -> None:
    limits = SpikeRule(sigmas, 16).limits(after(SpikeRule(sigmas, 16), losses))
    window = losses[-16:]
    expected = statistics.fmean(window) + sigmas * statistics.pstdev(window)
    assert limits.loss == pytest.approx(expected)
    assert limits.grad_norm == pytest.approx(2 * expected)


def test_half_a_window_is_needed_and_no_rule_judges_nothing() -> None:
    rule = SpikeRule(3, 8)
    assert rule.limits(after(rule, [1, 2, 3])) == Limits(math.inf, math.inf)
    assert rule.limits(after(rule, [1, 2, 3, 4])).loss < 10
    off = SpikeRule(None, 8)
    assert off.limits(progress([1.0] * 8, [1.0] * 8)) == Limits()
    assert off.after(progress([], []), loss=1, grad_norm=1) == progress([], [])


def test_a_window_forgets_and_survives_a_checkpoint_bit_for_bit() -> None:
    rule = SpikeRule(4.5, 4)
    kept = after(rule, [1e9, 0.1, 0.2, 0.3, 1 / 3])
    assert kept.recent_losses == (0.1, 0.2, 0.3, 1 / 3)
    assert kept.recent_grad_norms == (0.2, 0.4, 0.6, 2 / 3)
    back = Progress.model_validate_json(kept.model_dump_json())
    assert rule.limits(back) == rule.limits(kept)
