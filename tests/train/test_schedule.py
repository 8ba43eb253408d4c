"""Learning rate and length of a run: the promised shapes, and the refusals."""

import math
from itertools import pairwise

import pytest

from mamba_dist.config.schema import TrainingConfig
from mamba_dist.errors import ConfigError
from mamba_dist.train.schedule import learning_rate, total_steps

PEAK = 2e-3
TOTAL = 101
WARMUP = 10


def config(**changes: object) -> TrainingConfig:
    fields: dict[str, object] = {
        "global_batch_size": 32,
        "learning_rate": PEAK,
        "warmup_steps": WARMUP,
        "min_lr_ratio": 0.1,
        "max_steps": TOTAL,
    }
    return TrainingConfig.model_validate({**fields, **changes})


def rates(shape: str, **changes: object) -> list[float]:
    chosen = config(lr_schedule=shape, **changes)
    return [learning_rate(chosen, step=step, total_steps=TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_evenly_from_above_zero_to_the_peak(shape: str) -> None:
    rising = rates(shape)[:WARMUP]
    assert rising == pytest.approx([PEAK * (k + 1) / WARMUP for k in range(WARMUP)])
    assert rates(shape)[WARMUP] == pytest.approx(PEAK)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(shape: str) -> None:
    assert rates(shape, warmup_steps=0)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_floor_and_none_is_below_it(shape: str, floor: float) -> None:
    found = rates(shape, min_lr_ratio=floor)
    assert found[-1] == pytest.approx(PEAK * floor)
    assert min(found[WARMUP:]) == found[-1]
    assert all(a >= b for a, b in pairwise(found[WARMUP:]))


def test_cosine_is_half_way_down_in_the_middle_and_a_quarter_down_at_a_third() -> None:
    after = rates("cosine", min_lr_ratio=0.0)[WARMUP:]
    assert after[45] == pytest.approx(PEAK / 2)
    assert after[30] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi / 3)))


def test_linear_falls_by_the_same_amount_every_step() -> None:
    after = rates("linear", min_lr_ratio=0.0)[WARMUP:]
    falls = [a - b for a, b in pairwise(after)]
    assert falls == pytest.approx([PEAK / 90] * 90)


def test_constant_stays_at_the_peak_whatever_the_floor() -> None:
    assert rates("constant", min_lr_ratio=0.0)[WARMUP:] == pytest.approx([PEAK] * (TOTAL - WARMUP))


def test_wsd_is_flat_and_decays_in_the_last_share_of_the_run_only() -> None:
    found = rates("wsd", decay_share=0.2, min_lr_ratio=0.0)
    decay = round(0.2 * TOTAL)
    assert found[WARMUP : TOTAL - decay] == pytest.approx([PEAK] * (TOTAL - decay - WARMUP))
    assert found[TOTAL - decay :] == pytest.approx(
        [PEAK * left / decay for left in reversed(range(decay))]
    )


def test_wsd_that_decays_all_along_still_warms_up_first() -> None:
    found = rates("wsd", decay_share=1.0, min_lr_ratio=0.0)
    assert found[0] == pytest.approx(PEAK / WARMUP)
    assert found[WARMUP] == pytest.approx(PEAK * (TOTAL - 1 - WARMUP) / (TOTAL - WARMUP))


def test_a_run_of_one_step_after_warm_up_is_finite() -> None:
    for shape in ("cosine", "linear", "constant", "wsd"):
        rate = learning_rate(config(lr_schedule=shape, max_steps=11), step=10, total_steps=11)
        assert 0 < rate <= PEAK


def steps_of(**changes: object) -> int:
    fields = {"max_steps": None, "warmup_steps": 1, **changes}
    return total_steps(
        config(**fields), epoch_sequences=1000, global_batch_size=32, sequence_length=64
    )


def test_length_in_steps_is_taken_as_it_is() -> None:
    assert steps_of(max_steps=7) == 7


@pytest.mark.parametrize(("tokens", "steps"), [(2048 * 5, 5), (2048 * 5 + 1, 6), (2048 * 5 - 1, 5)])
def test_length_in_tokens_is_rounded_up_to_a_whole_step(tokens: int, steps: int) -> None:
    assert steps_of(max_tokens=tokens) == steps


def test_length_in_epochs_never_reads_a_sequence_more_than_so_often() -> None:
    # 1000 sequences, 32 a step: 31.25 steps an epoch.
    assert steps_of(num_epochs=1) == 31
    assert steps_of(num_epochs=4) == 125


def test_warm_up_longer_than_the_run_is_refused_once_the_data_is_known() -> None:
    with pytest.raises(ConfigError) as error:
        steps_of(num_epochs=1, warmup_steps=31)
    message = str(error.value)
    assert "training.warmup_steps is 31" in message
    assert "31 steps" in message
    assert "1000 training sequences" in message
    assert "lower warmup_steps" in message
    assert steps_of(num_epochs=1, warmup_steps=30) == 31
