"""Batch arithmetic over ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.config import BatchPlan, RunConfig, TrainingConfig, batch_plan
from mamba_dist.errors import ConfigError


def run(**training: int) -> RunConfig:
    return RunConfig(training=TrainingConfig(num_epochs=1, **training))


def test_accumulation_makes_the_global_batch_grow_with_the_ranks() -> None:
    config = run(micro_batch_size=6, gradient_accumulation_steps=3)
    assert batch_plan(config, 1) == BatchPlan(6, 3, 18)
    assert batch_plan(config, 4) == BatchPlan(6, 3, 72)


def test_a_global_batch_is_shared_by_the_ranks() -> None:
    config = run(micro_batch_size=4, global_batch_size=48)
    assert batch_plan(config, 1) == BatchPlan(4, 12, 48)
    assert batch_plan(config, 3) == BatchPlan(4, 4, 48)
    assert batch_plan(config, 12) == BatchPlan(4, 1, 48)


@pytest.mark.parametrize("world_size", [5, 8, 24])
def test_a_world_that_cannot_share_the_batch_is_told_which_ones_can(world_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        batch_plan(run(micro_batch_size=4, global_batch_size=48), world_size)
    assert str(caught.value) == (
        "training.global_batch_size 48 is 12 microbatches of training.micro_batch_size 4, which "
        f"{world_size} ranks cannot share evenly; numbers of ranks that can: 1, 2, 3, 4, 6, 12"
    )


def test_the_list_of_worlds_ends_for_a_huge_batch() -> None:
    with pytest.raises(ConfigError) as caught:
        batch_plan(run(micro_batch_size=1, global_batch_size=2**40), 3)
    assert str(caught.value).endswith(" 1024, 2048, 4096")


@settings(deadline=None, derandomize=True)
@given(
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 64),
    world_size=st.integers(1, 64),
)
def test_both_ways_to_give_a_batch_agree(micro: int, accumulation: int, world_size: int) -> None:
    given_steps = run(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    plan = batch_plan(given_steps, world_size)
    given_size = run(micro_batch_size=micro, global_batch_size=plan.global_batch_size)
    assert batch_plan(given_size, world_size) == plan


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_has_at_least_one_rank(world_size: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        batch_plan(run(gradient_accumulation_steps=1), world_size)
